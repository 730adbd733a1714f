"""Offers where walks of two steps from the user's last items lead, over the graph of what is taken together.

An item is tied to what was taken soon before and after it (builders/index/walks.py), so a walk reaches what
shares a neighbour with it, though nobody has taken the two in a row yet. Served like transitions.
"""

from __future__ import annotations

from ensemble.steps.recall_settings import RecallSettings
from ensemble.steps.served import ServedRelease
from ensemble.steps.sources import Transitions

WALKS = "walks.npy"


class Walks(Transitions):
    """Offers the items at the ends of the likeliest walks."""

    name, file = "walks", WALKS

    def __init__(self, release: ServedRelease, settings: RecallSettings) -> None:
        release.verify_data(self.file)
        super().__init__(release, settings)

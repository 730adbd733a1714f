"""Holds what a call to `recommend` or `search` gives back: small, typed, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ensemble.contract import Degraded


class Item(NamedTuple):
    """Names one recommended item and says how good it is."""

    item_id: str
    score: float  # the blended number that sorts
    probabilities: dict[str, float]  # by task: calibrated probability, or a regression's predicted number
    finders: tuple[str, ...] = ()  # of a search: what brought it, of words, text, image, shown, told


@dataclass(frozen=True)
class Recommendations:
    """Holds one user's list, best first."""

    user_id: str
    items: tuple[Item, ...]
    degraded: Degraded  # what was missing while the list was made; 0 = nothing
    release: str  # the name of the release that answered
    latency_ms: float  # of the whole call, retry included, as this process saw it
    sequence: int = 0  # number of the last change to items that the list knows; 0: none yet

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Gives the items' ids, best first."""
        return tuple(item.item_id for item in self.items)

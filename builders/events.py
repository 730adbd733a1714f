"""Learns what the kind of an event, and the time since the one before it, add to its item in a history
(ensemble/release/events.py): for the user encoder and for the ranker, a table each.

Axes: B batch, H history, X width of an item's row there, E kinds of events.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemble.arrays import Array
from ensemble.release.events import GAPS


class EventRows(nn.Module):
    """Holds a vector for each kind of event and one for each gap; all start at 0, so that only what helps is
    ever added. Padding is kind 0, which stays 0."""

    def __init__(self, num_kinds: int, width: int) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.zeros(num_kinds, width))
        self.gaps = nn.Parameter(torch.zeros(GAPS, width))

    def forward(self, cells: Tensor) -> Tensor:
        """Gives what events in cells [B, H] int64 add: [B, H, X] float32."""
        return nn.functional.embedding(cells, self._cells())

    def table(self) -> Array:
        """Gives what each cell adds [(E + 1) * GAPS, X] float32."""
        return self._cells().detach().numpy()

    def _cells(self) -> Tensor:
        there = self.kinds[:, None] + self.gaps  # [E, GAPS, X]
        return torch.cat([torch.zeros_like(self.gaps), there.flatten(0, 1)])

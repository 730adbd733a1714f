"""Learns what the kind and the age of an event add to its item in a history (ensemble/release/events.py).

Axes: L lists, H history, F item features, E kinds of events.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemble.arrays import Array
from ensemble.release.events import AGES
from ensemble.schema import Schema


class EventRows(nn.Module):
    """Holds a vector for each kind of event and one for each age; both start at 0, so that only what helps
    is ever added. Padding is kind 0, which stays 0."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        width = schema.sizes.item_features
        self.kinds = nn.Parameter(torch.zeros(len(schema.events) + 1, width))
        self.ages = nn.Parameter(torch.zeros(AGES, width))

    def forward(self, cells: Tensor) -> Tensor:
        """Gives what events in cells [L, H] int64 add: [L, H, F] float32."""
        return nn.functional.embedding(cells, self._cells())

    def table(self) -> Array:
        """Gives what each cell adds [(E + 1) * AGES, F] float32."""
        return self._cells().detach().numpy()

    def _cells(self) -> Tensor:
        there = self.kinds[1:, None] + self.ages  # [E, AGES, F]
        return torch.cat([torch.zeros_like(self.ages), there.flatten(0, 1)])

"""The seam between compression and ranking: whoever changes a model asks a Judge what held-out users get with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array


@dataclass(frozen=True)
class Judged:
    """What the same held-out users get with one variant of a model, all else in the chain unchanged."""

    gains: Array  # [Q] float64: each user's gain; the mean is NDCG@10
    lists: Array  # [Q, K] int64: the item rows each would be shown, best first, -1 padded

    def overlap(self, other: Judged) -> float:
        """Mean share of the shown items that both show (0 to 1)."""
        return float(overlaps(self.lists, other.lists).mean())


def overlaps(first: Array, second: Array) -> Array:
    """Share of each user's shown items that both lists show. [Q, K], [Q, K] -> [Q]."""
    shared = ((first[:, :, None] == second[:, None, :]) & (first[:, :, None] > 0)).any(2).sum(1)
    return shared / np.maximum((first > 0).sum(1), 1)


Judge = Callable[[bytes], Judged]  # a serialized ONNX model in place of the release's own -> what users then get

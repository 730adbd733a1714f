"""The seam between compression and ranking: whoever changes a model asks a Judge what held-out users get with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Judged:
    """What the same held-out users get with one variant of a model, all else in the chain unchanged."""

    gains: Array  # [Q] float64: each user's gain; the mean is NDCG@10
    lists: Array  # [Q, K] int64: the item rows each would be shown, best first, -1 padded

    def overlap(self, other: Judged) -> float:
        """Mean share of the shown items that both show (0 to 1)."""
        shared = (self.lists[:, :, None] == other.lists[:, None, :]) & (self.lists[:, :, None] > 0)
        return float((shared.any(2).sum(1) / np.maximum((self.lists > 0).sum(1), 1)).mean())


Judge = Callable[[bytes], Judged]  # a serialized ONNX model in place of the release's own -> what users then get

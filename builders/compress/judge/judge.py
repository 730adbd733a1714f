"""Joins compression and ranking: whoever changes a model asks a Judge what held-out users get with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput


@dataclass(frozen=True)
class Judged:
    """Holds what the same held-out users get with one variant of a model, all else in the chain unchanged."""

    gains: Array  # [Q] float64: each user's gain; the mean is NDCG@10
    lists: Array  # [Q, K] int64: the item rows each would be shown, best first, -1 padded

    def overlap(self, other: Judged) -> float:
        """Gives the mean share of the shown items that both show (0 to 1)."""
        return float(overlaps(self.lists, other.lists).mean())


def overlaps(first: Array, second: Array) -> Array:
    """Gives the share of each user's shown items that both lists show. [Q, K], [Q, K] -> [Q]."""
    shared = ((first[:, :, None] == second[:, None, :]) & (first[:, :, None] > 0)).any(2).sum(1)
    return shared / np.maximum((first > 0).sum(1), 1)


Judge = Callable[
    [bytes], Judged
]  # a serialized ONNX model in place of the release's own -> what users then get


@dataclass(frozen=True)
class Loss:
    """Compares one variant of a model with the uncompressed one, on the same users."""

    relative: float  # mean loss of the gain (NDCG@10) as a share of the uncompressed mean; below 0 = a gain
    error: float  # its paired standard error
    overlap: float  # of the shown lists with the uncompressed ones, 0 to 1

    @property
    def cost(self) -> float:
        """Adds what is surely lost (beyond two standard errors) and the share of the lists that changed."""
        return max(0.0, self.relative - 2 * self.error) + 1.0 - self.overlap


def compare(uncompressed: Judged, variant: Judged) -> Loss:
    """Compares two variants, paired over users.

    InvalidInput when nobody is judged or nobody's list holds what they wanted: no loss can be measured then.
    """
    base = float(uncompressed.gains.mean()) if len(uncompressed.gains) else 0.0
    if base <= 0:
        raise InvalidInput(
            "the judged users gain nothing from the uncompressed model: no loss can be measured; judge on "
            "more held-out users"
        )
    loss = (uncompressed.gains - variant.gains) / base
    return Loss(float(loss.mean()), float(loss.std() / np.sqrt(len(loss))), variant.overlap(uncompressed))

"""Figures of merit, in numpy, over whole arrays. Shared by training (early stop, calibration) and by
`verify`.

Axes: E impressions, Q held-out targets, N candidates. Labels are NaN where a task is not defined; those rows
are left out. A figure that the data cannot give (AUC of one class, the mean of nothing) is NaN, never an
error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array

MISSED = np.inf  # the rank of a target that is not in its list


def auc(labels: Array, scores: Array) -> float:
    """Chance that a positive scores above a negative, ties count half. labels [E] 0/1/NaN, scores [E]."""
    labels, scores = _defined(labels, scores)
    positive = labels > 0.5
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # 1-based; equal scores share the middle of their ranks
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(middle_rank[group.ravel()[positive]].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def rmse(labels: Array, values: Array) -> float:
    """Root mean square error. labels [E] (NaN = not defined), values [E]."""
    labels, values = _defined(labels, values)
    return float(np.sqrt(np.mean((values - labels) ** 2))) if len(labels) else float("nan")


def log_loss(labels: Array, probabilities: Array) -> float:
    """Mean binary cross entropy in nats. labels [E] 0/1/NaN, probabilities [E]."""
    labels, probabilities = _defined(labels, probabilities)
    if not len(labels):
        return float("nan")
    sure = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(sure) + (1 - labels) * np.log1p(-sure)))


def ece(labels: Array, probabilities: Array, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: a shop's probabilities crowd near 0, where equal
    widths see one bin."""
    labels, probabilities = _defined(labels, probabilities)
    if not len(labels):
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    edges = np.linspace(0, len(order), min(bins, len(order)) + 1).astype(np.int64)
    gaps = np.add.reduceat(labels[order] - probabilities[order], edges[:-1])
    return float(np.abs(gaps).sum() / len(order))


def ranks_from_lists(lists: Array, targets: Array) -> Array:
    """Place of each target in its list. lists [Q, N] int64, best first, padded with -1; targets [Q] -> [Q]
    float64, 0 = first, inf = missed."""
    found = lists == targets[:, None]
    return np.where(found.any(1), found.argmax(1), MISSED).astype(np.float64)


def ranks_from_scores(scores: Array, target_columns: Array) -> Array:
    """Place of the target's score among its row, ties count half. scores [Q, N], target_columns [Q] int64 (-1
    = missed) -> [Q] float64."""
    own = np.take_along_axis(scores, np.maximum(target_columns, 0)[:, None], 1)
    rank = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where(target_columns >= 0, rank, MISSED)


def hits(ranks: Array, k: int) -> Array:
    """1 where the target is among the first k, else 0. [Q] -> [Q] float64; its mean is HR@k (and recall@N for
    k = N)."""
    return (ranks < k).astype(np.float64)


def gains(ranks: Array, k: int) -> Array:
    """Gain 1/log2(rank + 2) within the first k, else 0. [Q] -> [Q] float64; with one target a row, its mean
    is NDCG@k."""
    return np.where(ranks < k, 1 / np.log2(np.where(ranks < k, ranks, 0) + 2), 0.0)


def hit_rate(ranks: Array, k: int) -> float:
    """HR@k."""
    return _mean(hits(ranks, k))


def ndcg(ranks: Array, k: int) -> float:
    """NDCG@k, one true item a row."""
    return _mean(gains(ranks, k))


def recall_at(ranks: Array, num_candidates: int) -> float:
    """recall@N: share of true items among the N candidates."""
    return hit_rate(ranks, num_candidates)


@dataclass(frozen=True)
class Difference:
    """What a paired bootstrap says of (second - first)."""

    mean: float
    low: float  # 2.5% quantile
    high: float  # 97.5% quantile
    p_worse: float  # share of resamples in which second is below first

    def __str__(self) -> str:
        return (
            f"{self.mean:+.5f} [{self.low:+.5f}, {self.high:+.5f}], worse in {self.p_worse:.1%} of resamples"
        )


def paired_bootstrap(
    first: Array, second: Array, users: Array, *, samples: int = 1000, seed: int = 0
) -> Difference:
    """Resamples users, not rows: rows of one user are not independent. first, second [Q] (gains, hits …),
    users [Q] int64."""
    if not len(users):
        return Difference(*[float("nan")] * 4)
    _, group = np.unique(users, return_inverse=True)
    counts = np.bincount(group.ravel()).astype(np.float64)
    sums = np.bincount(group.ravel(), weights=np.asarray(second, np.float64) - np.asarray(first, np.float64))
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // len(sums))  # resamples held at once: 32 MB
    means = []
    for start in range(0, samples, block):
        drawn = rng.integers(0, len(sums), (min(block, samples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    spread = np.concatenate(means)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Difference(float(sums.sum() / counts.sum()), float(low), float(high), float((spread < 0).mean()))


def _defined(labels: Array, values: Array) -> tuple[Array, Array]:
    """Both as float64, without the rows whose label is NaN."""
    labels, values = np.asarray(labels, np.float64).ravel(), np.asarray(values, np.float64).ravel()
    known = ~np.isnan(labels)
    return labels[known], values[known]


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")

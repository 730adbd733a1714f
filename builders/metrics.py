"""Computes figures of merit over whole arrays, for training (early stop, calibration), `verify` and the gate.

What the gate also resamples (AUC, calibration error, RMSE) is defined in builders/bootstrap.py.

Axes: E impressions, Q held-out targets, N candidates. Labels are NaN where a task is not defined; those rows
are left out. A figure that the data cannot give (AUC of one class, the mean of nothing) is NaN, never an
error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from builders import bootstrap
from ensemble.arrays import Array
from ensemble.bootstrap import Statistic

MISSED = np.inf  # the rank of a target that is not in its list


def auc(labels: Array, scores: Array) -> float:
    """Gives the chance that a positive scores above a negative, ties count half.

    labels [E] 0/1/NaN, scores [E]; NaN where there is only one class.
    """
    return _over_all(bootstrap.auc, labels, scores)


def rmse(labels: Array, values: Array) -> float:
    """Gives the root mean square error. labels [E] (NaN = not defined), values [E]."""
    return _over_all(bootstrap.rmse, labels, values)


def ece(labels: Array, probabilities: Array) -> float:
    """Gives the expected calibration error over 15 bins of equal mass. labels [E] 0/1/NaN, probabilities [E].

    A shop's probabilities crowd near 0, where bins of equal width would see one bin.
    """
    return _over_all(bootstrap.ece, labels, probabilities)


def ece_by_chance(labels: Array, probabilities: Array) -> float:
    """Gives the calibration error that these probabilities would have on so few rows if they were right: each
    bin's gap is that of a sum of coins, which is normal (mean of its size: the root of 2 / pi deviations).

    labels [E] 0/1/NaN, probabilities [E]; an error below it is no better than right.
    """
    labels, probabilities = _defined(labels, probabilities)
    if not len(labels):
        return float("nan")
    order, edges = bootstrap.bins_of(probabilities)
    spread = (probabilities * (1 - probabilities))[order]
    deviations = np.sqrt(np.add.reduceat(spread, edges[:-1]))
    return float(np.sqrt(2 / np.pi) * deviations.sum() / len(order))


def log_loss(labels: Array, probabilities: Array) -> float:
    """Gives the mean binary cross entropy in nats. labels [E] 0/1/NaN, probabilities [E]."""
    labels, probabilities = _defined(labels, probabilities)
    if not len(labels):
        return float("nan")
    sure = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(sure) + (1 - labels) * np.log1p(-sure)))


def ranks_from_lists(lists: Array, targets: Array) -> Array:
    """Finds the place of each target in its list: 0 = first, inf = missed.

    lists [Q, N] int64, best first, padded with -1; targets [Q] int64 -> [Q] float64.
    """
    found = lists == targets[:, None]
    return np.where(found.any(1), found.argmax(1), MISSED).astype(np.float64)


def ranks_from_scores(scores: Array, target_columns: Array) -> Array:
    """Finds the place of the target's score in its row; ties count half.

    scores [Q, N], target_columns [Q] int64 (-1 = missed) -> [Q] float64, inf = missed.
    """
    own = np.take_along_axis(scores, np.maximum(target_columns, 0)[:, None], 1)
    rank = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where(target_columns >= 0, rank, MISSED)


def hits(ranks: Array, k: int) -> Array:
    """Gives 1 where the target is among the first k, else 0. [Q] -> [Q] float64.

    The mean is HR@k (and recall@N for k = N).
    """
    return (ranks < k).astype(np.float64)


def gains(ranks: Array, k: int) -> Array:
    """Gives 1/log2(rank + 2) within the first k, else 0. [Q] -> [Q] float64.

    With one target a row the mean is NDCG@k.
    """
    return np.where(ranks < k, 1 / np.log2(np.where(ranks < k, ranks, 0) + 2), 0.0)


def hit_rate(ranks: Array, k: int) -> float:
    """Gives HR@k: the share of targets among the first k. ranks [Q]."""
    return _mean(hits(ranks, k))


def ndcg(ranks: Array, k: int) -> float:
    """Gives NDCG@k where each row has one true item. ranks [Q]."""
    return _mean(gains(ranks, k))


def recall_at(ranks: Array, num_candidates: int) -> float:
    """Gives recall@N: the share of true items among the N candidates. ranks [Q]."""
    return hit_rate(ranks, num_candidates)


def _over_all(kind: Callable[..., Statistic], labels: Array, values: Array) -> float:
    """Gives a resampled statistic of all rows at once, each counted once; NaN where there are none."""
    labels, values = _defined(labels, values)
    if not len(labels):
        return float("nan")
    everybody = np.zeros(len(labels), np.int64)  # one user, drawn once
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(kind(labels, values, everybody, 1)(np.ones((1, 1), np.float32))[0])


def _defined(labels: Array, values: Array) -> tuple[Array, Array]:
    """Gives both as float64, without the rows whose label is NaN."""
    labels, values = np.asarray(labels, np.float64).ravel(), np.asarray(values, np.float64).ravel()
    known = ~np.isnan(labels)
    return labels[known], values[known]


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")

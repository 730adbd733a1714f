"""Says how far figures of held-out users could be chance: AUC, calibration error, RMSE in each resample.

What draws the resamples is ensemble/bootstrap.py. Axes: U users, S resamples, E impressions.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.bootstrap import Statistic, ratio, user_rows, user_sums

_BINS = 15


def relative_loss(reference: Array, candidate: Array) -> Statistic:
    """Gives the share of the reference that the candidate lost; sums [U] of each."""
    return ratio(reference - candidate, reference)


def auc(labels: Array, values: Array, group: Array, num_users: int) -> Statistic:
    """Gives the exact AUC of each resample; ties count half.

    labels 0/1 [E], values [E], group [E] = their users. Impressions are sorted once: then a resample's AUC is
    a running sum over the negatives, read at the positives.
    """
    order = np.argsort(values, kind="stable")
    ordered, positive, owners = values[order], labels[order] > 0.5, group[order]
    before = np.concatenate([[0], np.cumsum(~positive)])  # negatives among the first so many
    own = ordered[positive]
    below, up_to = (before[np.searchsorted(ordered, own, side)] for side in ("left", "right"))
    positives, negatives = owners[positive], owners[~positive]

    def of(weights: Array) -> Array:
        running = np.zeros((len(weights), len(negatives) + 1))
        np.cumsum(weights[:, negatives], axis=1, out=running[:, 1:])
        mine = weights[:, positives]
        pairs = np.einsum("se,se->s", mine, running[:, below] + running[:, up_to], optimize=False) / 2
        return pairs / (mine.sum(1, dtype=np.float64) * running[:, -1])

    return of


def ece(labels: Array, values: Array, group: Array, num_users: int) -> Statistic:
    """Gives the expected calibration error; in every resample the bins of equal mass are those of all users.

    labels 0/1 [E], values [E] (probabilities), group [E] = their users.
    """
    order, edges = bins_of(values)
    bins = np.searchsorted(edges, np.arange(len(order)), "right") - 1
    count = len(edges) - 1
    gaps = np.bincount(
        group[order] * count + bins, weights=(labels - values)[order], minlength=num_users * count
    ).reshape(num_users, count)
    rows = user_rows(group, num_users)
    return lambda weights: np.abs(weights @ gaps).sum(1) / (weights @ rows)


def bins_of(values: Array) -> tuple[Array, Array]:
    """Gives the order [E] of values [E] from the least on, and where in it bins of equal mass begin and
    end."""
    order = np.argsort(values, kind="stable")
    return order, np.linspace(0, len(order), min(_BINS, len(order)) + 1).astype(np.int64)


def rmse(labels: Array, values: Array, group: Array, num_users: int) -> Statistic:
    """Gives the root mean square error. labels [E], values [E], group [E] = their users."""
    mean = ratio(user_sums(group, (labels - values) ** 2, num_users), user_rows(group, num_users))
    return lambda weights: np.sqrt(mean(weights))

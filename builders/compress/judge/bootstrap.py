"""Paired bootstrap over users, for figures that are sums over users: how far a loss could be chance.

Both releases are asked about the same users, and a resample draws users, with all that is theirs, for both
alike: the noise they share cancels, and rows of one user are not taken for independent. Source: Efron &
Tibshirani 1993, chapters 8 and 13 (percentile interval); for ranking metrics Sakai, SIGIR 2006.

Axes: U users, S resamples, E impressions, C columns. A weight is how often a resample drew a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array

Statistic = Callable[[Array], Array]  # weights [S, U] float32 -> its value in each resample [S]
_AT_ONCE = 4_000_000  # numbers held at once: 32 MB
_BINS = 15


@dataclass(frozen=True)
class Spread:
    """A figure of all users, and in each resample."""

    value: float
    samples: Array  # [S]

    @property
    def low(self) -> float:
        """2.5% quantile: the lower end of the 95% interval; NaN where no resample has a value."""
        return self._quantile(0.025)

    @property
    def high(self) -> float:
        return self._quantile(0.975)

    def _quantile(self, share: float) -> float:
        known = self.samples[np.isfinite(self.samples)]
        return float(np.quantile(known, share)) if len(known) else float("nan")

    def chance_within(self, limit: float) -> float:
        """One-sided p-value of "the true figure is at most `limit`"."""
        return (1 + int((~(self.samples > limit)).sum())) / (1 + len(self.samples))


def spreads(
    statistics: Sequence[Statistic], num_users: int, *, width: int = 0, samples: int = 1000, seed: int = 0
) -> list[Spread]:
    """Every statistic over the same resamples. `width`: numbers a statistic holds per resample (E), if more
    than num_users."""
    whole = np.ones((1, num_users), np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = [float(of(whole)[0]) for of in statistics]
        rng = np.random.default_rng(seed)
        block = max(1, _AT_ONCE // max(num_users, width, 1))
        parts: list[list[Array]] = [[] for _ in statistics]
        for start in range(0, samples, block):
            weights = _drawn(rng, min(block, samples - start), num_users)
            for part, of in zip(parts, statistics, strict=True):
                part.append(of(weights))
    return [Spread(value, np.concatenate(part)) for value, part in zip(values, parts, strict=True)]


def _drawn(rng: np.random.Generator, samples: int, num_users: int) -> Array:
    """[S, U] float32: as many draws as there are users, with replacement."""
    drawn = (
        rng.integers(0, num_users, (samples, num_users), dtype=np.int32)
        + np.arange(samples, dtype=np.int64)[:, None] * num_users
    )
    return (
        np.bincount(drawn.ravel(), minlength=samples * num_users)
        .reshape(samples, num_users)
        .astype(np.float32)
    )


def user_sums(group: Array, values: Array, num_users: int) -> Array:
    """Rows of the same user added up. group [Q] int64 (0 … U - 1), values [Q] -> [U] float64."""
    return np.bincount(group, weights=values, minlength=num_users)


def ratio(above: Array, below: Array) -> Statistic:
    """Sums above [U] and below [U] -> their ratio in each resample."""
    columns = np.stack([above, below], axis=1)

    def of(weights: Array) -> Array:
        top, bottom = (weights @ columns).T
        return top / bottom

    return of


def relative_loss(reference: Array, candidate: Array) -> Statistic:
    """Sums [U] of each -> the share of the reference that the candidate lost."""
    return ratio(reference - candidate, reference)


def auc(labels: Array, values: Array, group: Array, num_users: int) -> Statistic:
    """AUC of impressions (labels 0/1 [E], values [E], group [E] = their users), ties count half; exact in
    each resample.

    Sorted once: then a resample's AUC is a running sum over the negatives, read at the positives.
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
    """Expected calibration error; the bins of equal mass (as in metrics.ece) are those of all users, in every
    resample."""
    order = np.argsort(values, kind="stable")
    edges = np.linspace(0, len(order), min(_BINS, len(order)) + 1).astype(np.int64)
    bins = np.searchsorted(edges, np.arange(len(order)), "right") - 1
    count = len(edges) - 1
    gaps = np.bincount(
        group[order] * count + bins, weights=(labels - values)[order], minlength=num_users * count
    ).reshape(num_users, count)
    rows = np.bincount(group, minlength=num_users).astype(np.float64)
    return lambda weights: np.abs(weights @ gaps).sum(1) / (weights @ rows)


def rmse(labels: Array, values: Array, group: Array, num_users: int) -> Statistic:
    """Root mean square error."""
    squares, rows = (
        user_sums(group, (labels - values) ** 2, num_users),
        np.bincount(group, minlength=num_users).astype(np.float64),
    )
    mean = ratio(squares, rows)
    return lambda weights: np.sqrt(mean(weights))

"""Resamples users, for figures that are sums over users: how far a difference could be chance.

Two ways are asked about the same users (a paired bootstrap), and a resample draws users, with all that is
theirs, for both alike: the noise they share cancels, and rows of one user are not taken for independent.
Sources: Efron & Tibshirani 1993, chapters 8 and 13 (percentile interval); Sakai, SIGIR 2006 (ranking).

Axes: U users, S resamples, E impressions, C columns. A weight is how often a resample drew a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array

Statistic = Callable[[Array], Array]  # weights [S, U] float32 -> its value in each resample [S]
_AT_ONCE = 4_000_000  # numbers held at once: 32 MB


@dataclass(frozen=True)
class Spread:
    """Holds a figure of all users, and of each resample."""

    value: float
    samples: Array  # [S]

    @property
    def low(self) -> float:
        """Gives the 2.5% quantile, the lower end of the 95% interval; NaN where no resample has a value."""
        return self._quantile(0.025)

    @property
    def high(self) -> float:
        """Gives the 97.5% quantile, the upper end of the 95% interval; NaN where no resample has a value."""
        return self._quantile(0.975)

    def _quantile(self, share: float) -> float:
        known = self.samples[np.isfinite(self.samples)]
        return float(np.quantile(known, share)) if len(known) else float("nan")

    def chance_within(self, limit: float) -> float:
        """Gives the one-sided p-value of "the true figure is at most `limit`"."""
        return (1 + int((~(self.samples > limit)).sum())) / (1 + len(self.samples))


def spreads(
    statistics: Sequence[Statistic], num_users: int, *, width: int = 0, samples: int = 1000, seed: int = 0
) -> list[Spread]:
    """Computes every statistic over all users and over the same resamples.

    `width` is how many numbers a statistic holds for each resample (E), if more than `num_users`.
    """
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
    """Draws as many users as there are, with replacement: how often each, [S, U] float32."""
    drawn = (
        rng.integers(0, num_users, (samples, num_users), dtype=np.int32)
        + np.arange(samples, dtype=np.int64)[:, None] * num_users
    )
    return (
        np.bincount(drawn.ravel(), minlength=samples * num_users)
        .reshape(samples, num_users)
        .astype(np.float32)
    )


@dataclass(frozen=True)
class Difference:
    """Holds what a paired bootstrap says of (second - first)."""

    mean: float
    low: float  # 2.5% quantile
    high: float  # 97.5% quantile
    p_worse: float  # share of resamples in which second is below first

    def __str__(self) -> str:
        return (
            f"{self.mean:+.5f} [{self.low:+.5f}, {self.high:+.5f}], worse in {self.p_worse:.1%} of resamples"
        )


def paired_difference(first: Array, second: Array, users: Array, *, samples: int = 1000) -> Difference:
    """Compares two ways on the same rows; users are resampled, as rows of one user are not independent.

    first, second [Q] (gains, hits …), users [Q] int64; all NaN where there are no rows.
    """
    if not len(users):
        return Difference(*[float("nan")] * 4)
    num_users, group = groups(users)
    gained = user_sums(group, np.asarray(second, np.float64) - np.asarray(first, np.float64), num_users)
    [spread] = spreads([ratio(gained, user_rows(group, num_users))], num_users, samples=samples)
    return Difference(spread.value, spread.low, spread.high, float((spread.samples < 0).mean()))


def groups(users: Array) -> tuple[int, Array]:
    """Numbers the users of rows: user rows [Q] -> (how many users, each row's number among them [Q])."""
    known, group = np.unique(users, return_inverse=True)
    return len(known), group.ravel()


def user_rows(group: Array, num_users: int) -> Array:
    """Counts the rows of each user. group [Q] int64 (0 … U - 1) -> [U] float64."""
    return np.bincount(group, minlength=num_users).astype(np.float64)


def user_sums(group: Array, values: Array, num_users: int) -> Array:
    """Adds up the rows of each user. group [Q] int64 (0 … U - 1), values [Q] -> [U] float64."""
    return np.bincount(group, weights=values, minlength=num_users)


def ratio(above: Array, below: Array) -> Statistic:
    """Divides sums above [U] by sums below [U] in each resample."""
    columns = np.stack([above, below], axis=1)

    def of(weights: Array) -> Array:
        top, bottom = (weights @ columns).T
        return top / bottom

    return of

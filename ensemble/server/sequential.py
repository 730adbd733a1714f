"""Tells whether one stream of yes and no has more of them than another, at a level that holds however often
one looks.

For one stream, n trials and s hits, M(p) = B(a + s, b + n - s) / (B(a, b) p^s (1 - p)^(n - s)) is a mixture
of likelihood ratios against p, with mean 1 if p is true; so it ever reaches 1 / alpha with probability alpha
at most (Ville 1939; Robbins, "Statistical methods related to the law of the iterated logarithm", 1970), and
the p where it has not are a confidence sequence: true at all times at once (Howard, Ramdas, McAuliffe &
Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", 2021). Two streams differ where
their sequences, at half the level each, lie apart. This needs no normal approximation: hits may be rare. It
holds while trials are no likelier hits for the trials before; a burst of failures at once counts as many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_PRIOR = 0.5  # a = b, of Jeffreys' mixture: as good for rare hits as for common ones
_ROUNDS = 60  # of bisection: down to the last bit


class Hits(NamedTuple):
    """Counts hits among trials."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        """Gives the share of hits; 0 where nothing was tried."""
        return self.hits / self.trials if self.trials else 0.0


def lower_bound(seen: Hits, alpha: float) -> float:
    """Gives what the true share lies above, at all times at once with probability 1 - alpha."""
    if seen.hits == 0:
        return 0.0
    misses, limit = seen.trials - seen.hits, math.log(1 / alpha)
    mixture = _log_beta(_PRIOR + seen.hits, _PRIOR + misses) - _log_beta(_PRIOR, _PRIOR)
    low, high = 0.0, seen.share
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        likelihood = seen.hits * math.log(middle) + (misses * math.log1p(-middle) if misses else 0.0)
        low, high = (middle, high) if mixture - likelihood >= limit else (low, middle)
    return low


def upper_bound(seen: Hits, alpha: float) -> float:
    """Gives what the true share lies below, at all times at once with probability 1 - alpha."""
    return 1.0 - lower_bound(Hits(seen.trials - seen.hits, seen.trials), alpha)


def is_worse(tried: Hits, main: Hits, margin: float, alpha: float) -> bool:
    """Says whether the share of `tried` exceeds that of `main` by more than `margin`; with probability
    1 - alpha it never says so, at any look, where it does not."""
    return lower_bound(tried, alpha / 2) > upper_bound(main, alpha / 2) + margin


def _log_beta(a: float, b: float) -> float:
    """Gives the logarithm of the beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

"""The sequential test keeps its level however often one looks, and sees what is worse soon."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.server.sequential import Hits, is_worse, lower_bound, upper_bound

ALPHA, LOOKS, EACH, STREAMS = 0.05, 40, 50, 200


def hits_at_looks(rng: np.random.Generator, share: float) -> np.ndarray:
    """Hits after each look of every stream: [STREAMS, LOOKS]."""
    return np.cumsum(rng.binomial(EACH, share, (STREAMS, LOOKS)), axis=1)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_two_alike_are_told_apart_no_more_often_than_the_level_says(rng, share):
    """40 looks, 200 pairs of streams of 2,000 trials; margin 0, which is the hardest."""
    tried, main = hits_at_looks(rng, share), hits_at_looks(rng, share)
    false = sum(
        any(
            is_worse(Hits(int(s), n), Hits(int(m), n), 0.0, ALPHA)
            for s, m, n in zip(tried[i], main[i], range(EACH, EACH * LOOKS + 1, EACH), strict=True)
        )
        for i in range(STREAMS)
    )
    assert false <= ALPHA * STREAMS


def test_a_single_look_a_level_of_its_own_would_not_keep_it(rng):
    """The classical test at each look alarms many times too often: the streams here could tell."""
    tried, main = hits_at_looks(rng, 0.1), hits_at_looks(rng, 0.1)
    n = EACH * np.arange(1, LOOKS + 1)
    pooled = (tried + main) / (2 * n)
    z = (tried - main) / n / np.sqrt(np.maximum(2 * pooled * (1 - pooled) / n, 1e-12))
    assert (z > 1.645).any(axis=1).mean() > 4 * ALPHA


@pytest.mark.parametrize(
    ("bad", "good", "margin", "within"),
    [(1.0, 0.0, 0.01, 40), (0.2, 0.0, 0.01, 200), (0.05, 0.001, 0.01, 1500), (0.3, 0.1, 0.05, 1000)],
)
def test_what_is_worse_is_seen_soon(rng, bad, good, margin, within):
    """In nine of ten streams, with as many trials of each."""
    seen = [
        is_worse(
            Hits(int(rng.binomial(within, bad)), within),
            Hits(int(rng.binomial(within, good)), within),
            margin,
            0.01 / 6,
        )
        for _ in range(200)
    ]
    assert np.mean(seen) > 0.9


def test_bounds_enclose_the_share_at_all_looks(rng):
    share, n = 0.03, EACH * np.arange(1, LOOKS + 1)
    hits = hits_at_looks(rng, share)
    misses = sum(
        any(
            not lower_bound(Hits(int(s), int(k)), ALPHA) <= share <= upper_bound(Hits(int(s), int(k)), ALPHA)
            for s, k in zip(hits[i], n, strict=True)
        )
        for i in range(STREAMS)
    )
    assert misses <= ALPHA * STREAMS
    assert lower_bound(Hits(0, 10), ALPHA) == 0
    assert upper_bound(Hits(10, 10), ALPHA) == 1
    assert upper_bound(Hits(0, 0), ALPHA) == 1
    seen = [Hits(k // 10, k) for k in (10, 100, 9000)]
    widths = [upper_bound(one, ALPHA) - lower_bound(one, ALPHA) for one in seen]
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.04


def test_a_margin_is_granted(rng):
    tried, main = Hits(150, 10_000), Hits(100, 10_000)
    assert not is_worse(tried, main, 0.01, ALPHA)
    assert is_worse(Hits(400, 10_000), main, 0.01, ALPHA)
    assert not is_worse(main, Hits(400, 10_000), 0.0, ALPHA), "better is not worse"

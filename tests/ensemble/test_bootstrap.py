"""The paired bootstrap against known spreads."""

import numpy as np
import pytest

from ensemble.bootstrap import paired_difference


def test_paired_bootstrap_sees_a_difference_and_resamples_users():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(500), 4)
    first = rng.random(2000)
    better = paired_difference(first, first + rng.normal(0.05, 0.1, 2000), users)
    assert better.low > 0.03
    assert better.high < 0.07
    assert better.p_worse == 0
    # one shock a user: rows say nothing new, so the spread is that of 500 users
    shared = np.repeat(rng.normal(0, 1, 500), 4)
    wide = paired_difference(np.zeros(2000), shared, users)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * shared.std() / np.sqrt(500), rel=0.15)
    same = paired_difference(first, first, users)
    assert (same.mean, same.low, same.p_worse) == (0, 0, 0)


def test_no_rows_make_no_difference_known():
    nothing = paired_difference(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    assert np.isnan([nothing.mean, nothing.low, nothing.high, nothing.p_worse]).all()

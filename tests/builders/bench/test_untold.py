"""The table of products without a title counts hidden ones and others by themselves."""

from __future__ import annotations

import numpy as np

from builders.bench.untold import found_by, hidden_products
from builders.search.queries import FULL
from builders.search.shared_space import is_judged


def test_pictures_find_what_is_hidden_and_no_title_that_fits_loses_its_place():
    x = np.eye(4, dtype=np.float32)
    x[2] = 0.4, 0.1, 0, 0.1  # other titles say a little of what the third is asked by
    hidden = np.arange(4) == 2
    cosines = np.full((4, 4), 0.1, np.float32)
    cosines[2, 2] = 0.5
    found = {
        weight: found_by(x, cosines, hidden, weight, np.arange(4), np.array([FULL] * 4, object))
        for weight in (0.0, 2.0)
    }
    assert found[0.0]["hidden"] == {FULL: 0.431}
    assert found[2.0]["hidden"] == {FULL: 0.631}, "behind the best title"
    for of in found.values():
        assert of["others"] == {FULL: 1.0}
        assert of["others, full title first"] == 1
        assert of["hidden products"] == 1


def test_a_share_is_hidden_of_held_out_ones_first():
    ids = np.array([f"p{n}" for n in range(5_000)], "S")
    for share in (0.02, 0.1):
        hidden = hidden_products(ids, share)
        assert abs(hidden.mean() - share) < 0.01
        assert not (hidden & ~is_judged(ids)).any()
    assert abs(hidden_products(ids, 0.5).mean() - 0.5) < 0.05

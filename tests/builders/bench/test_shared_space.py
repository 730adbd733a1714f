"""Heads over frozen vectors find pairs that they have not seen, where there is something in common."""

from __future__ import annotations

import numpy as np
import torch

from builders.bench.shared_space import pair_figures, trained


def test_heads_find_pairs_that_were_held_out(rng):
    meaning = rng.normal(size=(650, 6)).astype(np.float32)
    ways = [rng.normal(size=(6, width)).astype(np.float32) for width in (24, 40)]
    first, second = (meaning @ way + 0.1 * rng.normal(size=(650, way.shape[1])) for way in ways)
    first, second = first.astype(np.float32), second.astype(np.float32)
    heads = trained(first[:500], second[:500], 0, 40, 0)
    with torch.no_grad():
        found = heads(torch.from_numpy(first[500:]), torch.from_numpy(second[500:]))
    after, before = (
        pair_figures(*(of.numpy() for of in found)),
        pair_figures(first[500:, :24], second[500:, :24]),
    )
    assert after["title -> picture"] > 0.8
    assert after["picture -> title"] > 0.8
    assert before["title -> picture"] < 0.3
    assert after["true pairs"] > after["others"] + 0.5


def test_ties_count_half():
    same = np.ones((40, 3), np.float32)
    assert pair_figures(same, same) == {
        "true pairs": 1.0,
        "others": 1.0,
        "title -> picture": 0.0,  # the middle of forty is no place among ten
        "picture -> title": 0.0,
    }

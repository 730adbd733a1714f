"""A past with events put into it, against the plainest way to say what it should be."""

from __future__ import annotations

import numpy as np
from any_order_model import merged_plainly
from hypothesis import given
from hypothesis import strategies as st

from ensemble.tiers.past import merge_past

events = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), max_size=25)


def merged(loaded: list[int], batches: list[list[tuple[int, int]]], width: int) -> list[int]:
    row, times = np.zeros(1, _row(width))[0], np.full(width, -np.inf)
    row["seen"] = -1
    if loaded:
        row["seen"][-len(loaded) :], row["seen_times"][-len(loaded) :] = loaded, 1000
        row["seen_kinds"][-len(loaded) :] = 1
    for batch in batches:
        rows, at = (np.array([one[column] for one in batch]) for column in (0, 1))
        times = merge_past(row, times, rows, np.ones(len(rows), int), at)
    padding = int((row["seen"] < 0).sum())
    assert (row["seen"][:padding] == -1).all()
    assert (row["seen_kinds"] == (row["seen"] > 0)).all()
    late = ~np.isneginf(times)
    assert (row["seen_times"][late] == times[late]).all()
    assert (row["seen_times"][~late] == np.where(row["seen"][~late] > 0, 1000, 0)).all()
    return row["seen"][padding:].tolist()


def _row(width: int) -> np.dtype:
    return np.dtype([("seen", "<i4", width), ("seen_times", "<u4", width), ("seen_kinds", "u1", width)])


def test_an_item_stands_once_a_kind_of_event():
    row = np.zeros(1, _row(4))[0]
    row["seen"] = -1
    rows, kinds, at = np.array([7, 7, 8, 7]), np.array([1, 2, 1, 1]), np.array([10.0, 20.0, 30.0, 40.0])
    merge_past(row, np.full(4, -np.inf), rows, kinds, at)
    assert row["seen"].tolist() == [-1, 7, 8, 7]
    assert row["seen_kinds"].tolist() == [0, 2, 1, 1]
    assert row["seen_times"].tolist() == [0, 20, 30, 40]


@given(st.lists(st.integers(1, 9), max_size=6), events, st.integers(6, 8), st.randoms(use_true_random=False))
def test_order_and_pieces_and_repetition_do_not_matter(loaded, happened, width, random):
    wanted = merged_plainly(loaded, happened, width) if happened else loaded
    shuffled = happened + random.sample(happened, len(happened) // 2)
    random.shuffle(shuffled)
    cuts = sorted(random.sample(range(len(shuffled) + 1), min(3, len(shuffled))))
    pieces = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    for batches in ([happened], [[one] for one in happened], [piece for piece in pieces if piece]):
        assert merged(loaded, [batch for batch in batches if batch], width) == wanted

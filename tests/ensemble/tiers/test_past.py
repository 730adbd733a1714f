"""A past with events put into it, against the plainest way to say what it should be."""

from __future__ import annotations

import numpy as np
from any_order_model import merged_plainly
from hypothesis import given
from hypothesis import strategies as st

from ensemble.tiers.past import merge_past

events = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), max_size=25)


def merged(loaded: list[int], batches: list[list[tuple[int, int]]], width: int) -> list[int]:
    seen, times = np.full(width, -1, np.int32), np.full(width, -np.inf)
    if loaded:
        seen[-len(loaded) :] = loaded
    for batch in batches:
        rows, at = (np.array([one[column] for one in batch]) for column in (0, 1))
        seen, times = merge_past(seen, times, rows, at)
        assert seen.dtype == np.int32
    padding = int((seen < 0).sum())
    assert (seen[:padding] == -1).all()
    return seen[padding:].tolist()


@given(st.lists(st.integers(1, 9), max_size=6), events, st.integers(6, 8), st.randoms(use_true_random=False))
def test_order_and_pieces_and_repetition_do_not_matter(loaded, happened, width, random):
    wanted = merged_plainly(loaded, happened, width) if happened else loaded
    shuffled = happened + random.sample(happened, len(happened) // 2)
    random.shuffle(shuffled)
    cuts = sorted(random.sample(range(len(shuffled) + 1), min(3, len(shuffled))))
    pieces = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    for batches in ([happened], [[one] for one in happened], [piece for piece in pieces if piece]):
        assert merged(loaded, [batch for batch in batches if batch], width) == wanted

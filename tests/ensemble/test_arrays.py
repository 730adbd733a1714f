"""Shows that what works on whole batches gives what a loop over users gives."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ensemble.arrays import first_kept, look_up, sum_by_row, without_repeats

batches = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-1, 6), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


@given(batches, st.integers(1, 12))
def test_the_first_rows_of_each_user_move_to_the_front(rows, limit):
    width = min(limit, len(rows[0]))
    wanted = [[row for row in user if row > 0][:width] for user in rows]
    wanted = [user + [-1] * (width - len(user)) for user in wanted]
    assert first_kept(np.array(rows), limit).tolist() == wanted


@given(batches)
def test_a_repeat_is_what_stands_further_left_already(rows):
    wanted = [
        [row if row > 0 and row not in user[:column] else -1 for column, row in enumerate(user)]
        for user in rows
    ]
    found = without_repeats(np.array(rows))
    assert np.where(found > 0, found, -1).tolist() == wanted


@given(batches, batches)
def test_summed_scores_are_found_again(rows, asked):
    scores = np.arange(1, 1 + np.size(rows), dtype=np.float32).reshape(np.shape(rows))
    known, sums = sum_by_row(np.array(rows), scores)
    asked = np.resize(np.array(asked), (len(rows), len(asked[0])))
    found = look_up(asked, known, sums, 100)
    for user, user_rows in enumerate(rows):
        for place, row in enumerate(asked[user]):
            wanted = sum(s for r, s in zip(user_rows, scores[user], strict=True) if r == row > 0)
            assert found[user, place] == wanted
        assert all(np.diff(known[user][known[user] > 0]) > 0)

"""Two releases are compared on the held-out rows that both kept, and on no others."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.errors import ReleaseError
from ensemble.release.held_out import FEWEST_USERS, HELD_OUT, compare, held_out_rows, read_held_out


def rows(
    gains: np.ndarray, first_user: int = 0, time: int = 100, width: int = 4, worth: np.ndarray | None = None
) -> np.ndarray:
    """A held-out row each of so many users, who took item i at `time`."""
    users = np.array([f"u{first_user + n}" for n in range(len(gains))], dtype=f"S{width}")
    return held_out_rows(users, np.full(len(gains), b"i"), np.full(len(gains), time), gains, worth)


def test_a_release_that_gives_most_users_less_is_worse(rng):
    gains = rng.random(200)
    found = compare(rows(gains), rows(gains - 0.1 + rng.normal(0, 0.2, 200)))
    assert found.is_worse
    assert found.users == 200
    assert found.before == pytest.approx(gains.mean(), abs=1e-6)
    assert found.low < found.difference < found.high < 0


def test_a_difference_that_chance_could_make_is_not_worse(rng):
    gains = rng.random(200)
    assert not compare(rows(gains), rows(gains + rng.normal(0, 0.2, 200))).is_worse
    assert not compare(rows(gains), rows(gains + 0.1)).is_worse
    assert not compare(rows(gains), rows(gains)).is_worse


def test_only_rows_that_tested_both_count(rng):
    """The users of one only, an older row of the same user, and other widths of ids change nothing."""
    gains, worse = rng.random(100), rng.random(100) - 1
    both = compare(rows(gains), rows(gains))
    first = np.concatenate([rows(gains), rows(worse, 500)])
    second = np.concatenate([rows(gains, width=9)[::-1], rows(worse, 700), rows(worse, 500, time=99)])
    assert compare(first, second) == both


def test_worth_is_compared_where_both_have_it_measured_in_one_way(rng):
    """Else, as with releases that have none, the gain decides."""
    gains, worth = rng.random(100), rng.random(100)
    old, new = rows(gains, worth=worth), rows(gains + 0.2, worth=worth - 0.2)
    found = compare(old, new)
    assert (found.is_worse, found.figure, found.users) == (True, "worth", 100)
    assert "the worth of an item shown -0.2000 of " in found.line("r2", "r1")
    older = old[["user", "item", "time", "gain"]]
    for one, other, same in ((older, new, True), (old, new, False), (old, rows(gains + 0.2), True)):
        found = compare(one, other, same_worth=same)
        assert (found.is_worse, found.figure) == (False, "ndcg@10")
    few = rows(gains + 0.2, worth=np.where(np.arange(100) < FEWEST_USERS - 1, worth - 0.2, np.nan))
    assert compare(old, few).figure == "ndcg@10"
    moments = rows(np.full(100, np.nan), worth=worth, time=5)
    found = compare(np.concatenate([old, moments]), np.concatenate([new, moments]))
    assert found.figure == "worth"
    assert found.difference == pytest.approx(-0.1, abs=1e-6)


def test_a_file_of_an_older_release_is_read(tmp_path):
    older = rows(np.ones(3))[["user", "item", "time", "gain"]]
    np.save(
        tmp_path / HELD_OUT,
        np.array(older.tolist(), [("user", "S4"), ("item", "S1"), ("time", "i8"), ("gain", "f4")]),
    )
    assert read_held_out(tmp_path / HELD_OUT)["gain"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (None, rows(np.ones(50)), "the active one has no results of held-out users"),
        (rows(np.ones(50)), None, "the new one has no results of held-out users"),
        (rows(np.ones(50)), rows(np.zeros(50), time=101), "no users have a held-out item in both"),
        (rows(np.ones(50)), rows(np.zeros(FEWEST_USERS - 1)), f"{FEWEST_USERS - 1} users have"),
    ],
)
def test_without_shared_rows_nothing_can_be_told(first, second, why):
    found = compare(first, second)
    assert not found.is_worse
    assert why in found.line("r2", "r1")
    assert found.line("r2", "r1").startswith("cannot tell whether r2 is worse than r1: ")


def test_a_file_that_is_none_of_ours_is_refused_in_a_line(tmp_path):
    assert read_held_out(tmp_path / HELD_OUT) is None
    np.save(tmp_path / HELD_OUT, np.zeros(3))
    with pytest.raises(ReleaseError, match=r"cannot read .*held_out\.npy: its columns are None; build"):
        read_held_out(tmp_path / HELD_OUT)
    (tmp_path / HELD_OUT).write_bytes(b"spoiled")
    with pytest.raises(ReleaseError, match=r"cannot read .*held_out\.npy"):
        read_held_out(tmp_path / HELD_OUT)

"""Ids at the edge, rows inside."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.errors import InvalidInput
from ensemble.release.ids import IdMap, open_ids, write_ids

IDS = st.lists(
    st.text(min_size=1, max_size=6).map(str.encode).filter(lambda b: not b.endswith(b"\0")),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(IDS, IDS)
def test_rows_and_ids_are_each_others_inverse_and_strangers_are_row_0(known, asked):
    ids = IdMap(np.array(sorted(known), "S"))
    rows = ids.rows_from_ids(np.array(known, dtype=object))
    assert ids.ids_from_rows(rows).tolist() == known
    assert sorted(rows.tolist()) == list(range(1, len(known) + 1))
    assert ids.rows_from_ids(np.array(asked, "S")).tolist() == [
        1 + sorted(known).index(i) if i in known else 0 for i in asked
    ]


def test_a_longer_id_does_not_match_its_prefix():
    ids = IdMap(np.array([b"ab", b"cd"]))
    assert ids.rows_from_ids(np.array([b"abc", b"ab", b"a", b""])).tolist() == [0, 1, 0, 0]


def test_ids_longer_than_any_known_are_strangers_and_harm_no_neighbour():
    ids = IdMap(np.array([b"ab", b"cd"]))
    asked = np.array([[b"ab", b"ab" + b"x" * 126], [b"cde", b"cd"]])
    assert ids.rows_from_ids(asked).tolist() == [[1, 0], [0, 2]]


def test_a_long_id_does_not_copy_the_map():
    """A copy at the long id's width would be 128 bytes for each of the ids that are known."""
    ids = IdMap(np.char.zfill(np.arange(100_000).astype("S6"), 6))
    asked = np.array([b"000012", b"x" * 128])
    tracemalloc.start()
    try:
        assert ids.rows_from_ids(asked).tolist() == [13, 0]
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_shape_is_kept_and_rows_below_1_have_no_id():
    ids = IdMap(np.array([b"ab", b"cd"]))
    assert ids.rows_from_ids(np.array([[b"cd"], [b"x"]])).tolist() == [[2], [0]]
    assert ids.ids_from_rows(np.array([[2, 0], [-1, 1]])).tolist() == [[b"cd", b""], [b"", b"ab"]]


def test_an_empty_map_knows_nobody():
    ids = IdMap(np.zeros(0, "S1"))
    assert ids.rows_from_ids(np.array([b"a"])).tolist() == [0]
    assert ids.ids_from_rows(np.array([0, -1])).tolist() == [b"", b""]


def test_maps_are_memory_mapped(tmp_path):
    write_ids(tmp_path / "ids.npy", np.array([b"a", b"b"]))
    assert isinstance(open_ids(tmp_path / "ids.npy").sorted_ids, np.memmap)


@pytest.mark.parametrize("ids", [[b"b", b"a"], [b"a", b"a"]])
def test_unsorted_or_repeated_ids_are_refused(tmp_path, ids):
    with pytest.raises(InvalidInput, match=r"^ids of an id map must be sorted and distinct$"):
        write_ids(tmp_path / "ids.npy", np.array(ids))


def test_an_id_too_long_is_refused(tmp_path):
    write_ids(tmp_path / "ids.npy", np.array([b"x" * 128]))
    with pytest.raises(InvalidInput, match=r"^id 'x+': an id must have at most 128 bytes, got 129$"):
        write_ids(tmp_path / "ids.npy", np.array([b"x" * 129]))

"""Splits that the shop gives itself: by a column, or by files of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.data import stage
from builders.data.check import check_shop
from builders.data.stage import load_dataset
from builders.shop.catalogue import write_changes
from builders.shop.files import shop_files
from ensemble.errors import InvalidInput
from ensemble.schema import Sizes

# user, item, time, clicked, part: u1's parts follow the clock, and so do u2's
CLOCKED = """u1,a,100,1,train
u1,b,200,1,train
u1,c,300,1,validation
u1,d,400,1,test
u2,b,150,1,train
u2,c,160,0,train
u2,a,170,1,Val
u2,d,500,1,TEST
"""
# the same, but u2's test comes before what trains
MIXED = CLOCKED.replace("u2,d,500,1,TEST", "u2,d,90,1,TEST")


def _write(folder: Path, rows: str, split: str, *, label: str = "", **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {"log": rows, **files}.items():
        (folder / f"{name}.csv").write_text("user_id,item_id,time,clicked,part\n" + text)
    (folder / "shop.toml").write_text(
        f'name = "parts"\nsplit = {split}\n[interactions]\nfile = "log.csv"\n[[tasks]]\nname = "ctr"\n'
        f'label = {{column = "clicked"{label}}}\n'
    )
    return folder


def _rows(impressions) -> list[tuple[int, int]]:
    return sorted(zip(impressions.user_rows.tolist(), impressions.item_rows.tolist(), strict=True))


COLUMN = '{kind = "column", column = "part"}'
TRAIN, VALIDATION, TEST = [(1, 1), (1, 2), (2, 2), (2, 3)], [(1, 3), (2, 1)], [(1, 4), (2, 4)]


@pytest.mark.parametrize("rows", [CLOCKED, MIXED], ids=["clocked", "mixed"])
def test_each_row_does_what_its_column_says(tmp_path, rows):
    dataset = load_dataset(_write(tmp_path, rows, COLUMN))
    parts = (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions)
    assert [_rows(part) for part in parts] == [TRAIN, VALIDATION, TEST]
    starts, histories = dataset.histories.offsets, dataset.histories.item_rows
    trained = [sorted(histories[starts[u] : dataset.train_ends[u]].tolist()) for u in (1, 2)]
    assert trained == [[1, 2], [2]], "a history to train on has no row of another part, whenever that was"
    assert dataset.test.item_rows.tolist() == [4, 4]
    assert dataset.validation.item_rows.tolist() == [3, 1]


@pytest.mark.parametrize("rows", [CLOCKED, MIXED], ids=["clocked", "mixed"])
def test_rows_given_as_test_are_in_no_refit_and_in_no_served_history(tmp_path, rows):
    dataset = load_dataset(_write(tmp_path, rows, COLUMN))
    assert 4 not in np.concatenate([part.item_rows for part in dataset.refit_impressions])
    starts = dataset.histories.offsets
    known = [dataset.histories.item_rows[starts[u] : dataset.known_ends[u]].tolist() for u in (1, 2)]
    assert all(4 not in of for of in known)
    again = load_dataset(_write(tmp_path, rows, COLUMN.replace("}", ", keep_test = false}")))
    assert 4 in np.concatenate([part.item_rows for part in again.refit_impressions])


def test_files_of_their_own_split_like_a_column(tmp_path):
    lines = CLOCKED.splitlines(keepends=True)
    test = "".join(line for line in lines if line.rstrip().lower().endswith("test"))
    rest = "".join(line for line in lines if line not in test)
    folder = _write(tmp_path, rest, '{kind = "files", test_file = "own.csv", validation = 0.4}', own=test)
    dataset = load_dataset(folder)
    assert _rows(dataset.test_impressions) == TEST
    assert sorted(_rows(dataset.train_impressions) + _rows(dataset.validation_impressions)) == sorted(
        TRAIN + VALIDATION
    )
    assert (1, 3) in _rows(dataset.validation_impressions), "the last of what trains validates"
    assert folder / "own.csv" in shop_files(folder), "another test file is another build"


def test_check_says_what_the_parts_are(tmp_path):
    report = check_shop(_write(tmp_path / "a", CLOCKED, COLUMN))
    assert report.sections["split"] == {
        "rows that train": 4,
        "that validate": 2,
        "that test": 2,
        "order": "each user's parts follow the clock",
    }
    assert "overlap" in check_shop(_write(tmp_path / "b", MIXED, COLUMN)).sections["split"]["order"]


@pytest.mark.parametrize(
    ("rows", "split", "said"),
    [
        (
            CLOCKED.replace("Val", "later"),
            COLUMN,
            "row 7: 'later' is no part of a split; write train, validat",
        ),
        (
            CLOCKED.replace("test", "train").replace("TEST", "train"),
            COLUMN,
            "column 'part' has no row to test",
        ),
        (CLOCKED, '{kind = "column"}', "needs column"),
        (CLOCKED, '{kind = "time", column = "part"}', "takes no column"),
        (CLOCKED, '{kind = "files", test_file = "own.csv"}', "own.csv is missing"),
        (CLOCKED, '{kind = "files", test_file = "log.csv"}', "the interactions' own file"),
        (
            CLOCKED,
            '{kind = "files", test_file = "a.csv", validation_file = "a.csv"}',
            "a row does one of them",
        ),
    ],
)
def test_a_wrong_split_is_refused_by_name(tmp_path, rows, split, said):
    with pytest.raises(InvalidInput, match=said):
        load_dataset(_write(tmp_path, rows, split))


def test_an_error_names_the_file_and_row_that_it_is_in(tmp_path):
    split = '{kind = "files", test_file = "own.csv"}'
    folder = _write(tmp_path, CLOCKED, split, own="u1,d,400,1,x\nu2,d,soon,1,x\n")
    with pytest.raises(InvalidInput, match=r"own\.csv: column 'time', row 2: 'soon'"):
        load_dataset(folder)


def test_labels_with_times_need_parts_that_follow_the_clock(tmp_path):
    with pytest.raises(InvalidInput, match="overlap in time, but task 'ctr' asks when its label came"):
        load_dataset(_write(tmp_path, MIXED, COLUMN, label=', time = "time", within = "1d"'))


def _said_by_a_build(folder: Path, scratch: Path) -> list[str]:
    """What the stage `data` leaves to be said to whoever builds."""
    _, changes, _ = write_changes(scratch, scratch)
    stage.run({"shop": folder, "catalogue": changes}, Sizes(), scratch, lambda share, text: None)
    return (scratch / stage.LINES).read_text().splitlines()


@pytest.mark.parametrize(("rows", "overlap"), [(CLOCKED, False), (MIXED, True)], ids=["clocked", "mixed"])
def test_a_build_says_when_parts_overlap_in_time(tmp_path, rows, overlap):
    (tmp_path / "work").mkdir()
    [line] = _said_by_a_build(_write(tmp_path / "shop", rows, COLUMN), tmp_path / "work")
    assert line.startswith("split: rows that train 4, ")
    assert ("parts overlap in time" in line) == overlap


AT_ONCE = "ctr: no column says when these labels came, so they count as known at once; "
LATER = "\n".join(
    f"u{user},{item},{10**9 + 100 * item},{item % 2},train" for user in (1, 2) for item in range(1, 9)
)
# The parts overlap, so that a label's time would be refused
OVER = f"{LATER}\nu1,1,{10**9},1,test"


@pytest.mark.parametrize(
    ("rows", "split", "label", "is_said"),
    [
        (LATER, '{kind = "time"}', "", True),
        (LATER, '{kind = "time"}', ', time = "time"', False),
        (CLOCKED, COLUMN, "", False),
        (OVER, COLUMN, "", False),
    ],
    ids=["no time", "time", "no clock", "overlap"],
)
def test_labels_without_a_time_are_said_where_there_is_a_clock(tmp_path, rows, split, label, is_said):
    (tmp_path / "work").mkdir()
    folder = _write(tmp_path / "shop", rows, split, label=label)
    lines = _said_by_a_build(folder, tmp_path / "work")
    assert [AT_ONCE in line for line in lines if line.startswith("labels: ")] == [True] * is_said
    labels = check_shop(folder).sections.get("labels", {})
    assert labels.get("known at once", "").startswith(AT_ONCE) == is_said

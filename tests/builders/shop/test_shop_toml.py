"""Each thing that can be wrong with a shop, with the exact words that say so."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builders.data.check import check_shop
from builders.data.stage import load_dataset
from ensemble.errors import InvalidInput

NOW_S = 1_000_000_000.0
SHOP = """\
name = "tiny"
split = "time"
[interactions]
file = "interactions.csv"
[items]
file = "items.csv"
id = "item_id"
title = "title"
features = [{name = "brand", kind = "category"}, {name = "price", kind = "number"}]
[[tasks]]
name = "ctr"
label = {column = "clicked"}
"""
HEADER = "user_id,item_id,time,clicked\n"
INTERACTIONS = HEADER + "u1,a,10,1\nu1,b,20,0\nu2,b,30,1\nu2,c,40,1\nu1,c,50,1\n"
ITEMS = "item_id,title,brand,price\na,Red Lipstick,Lumari,9.5\nb,Remover,Vena,4\nc,Serum,Lumari,30\n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.toml").write_text(SHOP)
    (tmp_path / "interactions.csv").write_text(INTERACTIONS)
    (tmp_path / "items.csv").write_text(ITEMS)
    return tmp_path


def error_of(shop: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_dataset(shop, now_s=NOW_S)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(shop), "SHOP")


def test_the_tiny_shop_is_right(shop: Path) -> None:
    report = check_shop(shop, now_s=NOW_S)
    assert report.sections["interactions"]["rows"] == 5
    assert report.sections["tasks"]["ctr"] == "binary, 5 labels, 80.00% positive"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "interactions.csv",
            None,
            "SHOP/interactions.csv is missing; shop.toml names it as 'interactions.csv'",
        ),
        ("items.csv", None, "SHOP/items.csv is missing; shop.toml names it as 'items.csv'"),
        (
            "shop.toml",
            None,
            "SHOP/shop.toml is missing; make a shop with `peregrine shop generate` or `peregrine shop "
            "import`, "
            "or write one (see `peregrine shop --help`)",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("time", "when"),
            "SHOP/interactions.csv has no column 'time'; its columns are 'user_id', 'item_id', 'when', "
            "'clicked'",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,b,30,1", "u2,b,30,maybe"),
            "interactions.csv: column 'clicked', row 3: 'maybe' is no number",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,b,30,1", "u2,b,30,3"),
            "interactions.csv: column 'clicked', row 3: '3' is neither 0 nor 1; "
            "task 'ctr' is binary: give its label a threshold or make it a regression",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,b,30,1", "u2,b,30,1e999"),
            "interactions.csv: column 'clicked', row 3: '1e999' is no finite number; leave the cell empty "
            "(null) where a value is missing",
        ),
        (
            "items.csv",
            ITEMS.replace("9.5", "-1e999"),
            "items.csv: column 'price', row 1: '-1e999' is no finite number; leave the cell empty "
            "(null) where "
            "a value is missing",
        ),
        ("items.csv", ITEMS.replace("30", "cheap"), "items.csv: column 'price', row 3: 'cheap' is no number"),
        (
            "items.csv",
            ITEMS + "a,Again,Vena,1\n",
            "items.csv: column 'item_id', row 4: 'a' is there already (row 1); one row per item_id",
        ),
        ("items.csv", ITEMS.splitlines()[0] + "\n", "items.csv has no rows"),
        (
            "items.csv",
            "\n".join(ITEMS.splitlines()[:2]) + "\n",
            "items.csv has one item, 'a'; at least 2 are needed to rank",
        ),
        ("interactions.csv", HEADER, "interactions.csv has no rows; a shop needs interactions to learn from"),
        ("interactions.csv", "", "SHOP/interactions.csv has no first line; it must name the columns"),
        (
            "interactions.csv",
            INTERACTIONS + "u1,a\n",
            "SHOP/interactions.csv: row 6 has 2 cells, its header 4 (separated by ','): 'u1,a'; "
            "quote cells that "
            'hold the separator, or name another one: separator = "…"',
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2", "u1"),
            "interactions.csv: all rows are of one user, 'u1'; at least 2 are needed to learn what users "
            "share",
        ),
        (
            "interactions.csv",
            re.sub(",1\n", ",0\n", INTERACTIONS),
            "interactions.csv: nobody has the label of task 'ctr' (column 'clicked' is never 1); correct "
            "its label or drop it",
        ),
        (
            "interactions.csv",
            re.sub(",[01]\n", ",\n", INTERACTIONS),
            "interactions.csv: nobody has the label of task 'ctr' (column 'clicked' is always empty); "
            "correct its label or drop it",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,c,40", "u2,c,4102444800"),
            "interactions.csv: column 'time', row 4: '4102444800' reads as one of Unix seconds, and "
            "most others as "
            "positions (they order, no clock); correct it, or say which all are: "
            'time_unit = "s" (or "position", numbers that only order)',
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,c,40", "u2,c,999999999000"),
            "interactions.csv: column 'time', row 4: '999999999000' reads as one of Unix "
            "milliseconds, and most "
            "others as positions (they order, no clock); correct it, or say which all are: "
            'time_unit = "ms" (or "position", numbers that only order)',
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,c,40", "u2,c,"),
            "interactions.csv: column 'time', row 4: the time is missing; fill it in, or leave the row out",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u1,", "nan,").replace("u2,c,40", "u9,c,40"),
            "interactions.csv: column 'user_id', row 1: the id is missing, as in 3 of 5 rows; at "
            "most 50% may "
            "lack it (such rows are left out)",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,c,40", "u\0,c,40"),
            "interactions.csv: column 'user_id', row 4: 'u\\x00' is no id: an id must hold no NUL byte",
        ),
        (
            "interactions.csv",
            INTERACTIONS.replace("u2,c,40", "ü" * 65 + ",c,40"),
            f"interactions.csv: column 'user_id', row 4: {repr('ü' * 65)[:57]}… is no id: an id must have at "
            "most 128 bytes, got 130",
        ),
        (
            "items.csv",
            ITEMS.replace("\na,", "\nx,").replace("\nb,", "\ny,").replace("\nc,", "\nz,"),
            "interactions.csv: no row's item is in items.csv, for example 'a' (there: 'x'); do both "
            "use the same "
            "ids?",
        ),
    ],
)
def test_wrong_files_are_named(shop: Path, file: str, text: str | None, message: str) -> None:
    if text is None:
        (shop / file).unlink()
    else:
        (shop / file).write_text(text)
    assert error_of(shop) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'kind = "number"',
            'kind = "nr"',
            "items.features.1.kind: 'nr' is no kind of feature; use category, number, text, image, "
            "video, vector(<dim>)",
        ),
        ('name = "price"', 'name = "brand"', "items: two features are called 'brand'"),
        (
            'title = "title"',
            'titel = "title"',
            "items.titel: no such key; known here: file, separator, encoding, decimal, id, title, features",
        ),
        (
            '{column = "clicked"}',
            "{threshold = 1}",
            'tasks.0.label: a label is either {event = "…"} or {column = "…"}',
        ),
        (
            '{column = "clicked"}',
            '{event = "click"}',
            "task 'ctr' is labelled by the event 'click', but interactions.event names no column",
        ),
        (
            'name = "ctr"',
            'name = "recall"',
            "a task may not be called 'recall', which among a request's weights means recall's relevance; "
            "name it after what it predicts",
        ),
        (
            'name = "ctr"',
            'name = "ctr"\ngiven = "view"',
            "task 'ctr' is given 'view', which is no binary task before it",
        ),
        (
            '{column = "clicked"}',
            '{column = "clicked", within = "7d"}',
            "task 'ctr' has a label within a time, but nothing says when it comes in: give its column a "
            "time, or name the event that shows an item, interactions.impression",
        ),
        (
            'label = {column = "clicked"}',
            'label = {event = "click", time = "when"}',
            "tasks.0.label: a label's time is of a column; an event has its own",
        ),
        (
            '{column = "clicked"}',
            '{column = "clicked", within = "a week"}',
            'tasks.0.label.within: \'a week\' is no length of time; write "7d", "12h", "30min", or seconds, '
            "at least 1",
        ),
        (
            'split = "time"',
            'split = "weekly"',
            "split.kind = 'weekly': should be 'leave_one_out', 'time', 'random', 'column' or 'files'",
        ),
        ('file = "interactions.csv"', "", "interactions.file is missing"),
    ],
)
def test_a_wrong_shop_toml_is_named(shop: Path, old: str, new: str, message: str) -> None:
    (shop / "shop.toml").write_text(SHOP.replace(old, new, 1))
    assert error_of(shop) == f"SHOP/shop.toml: {message}"


def test_what_is_not_toml_is_named(shop: Path) -> None:
    (shop / "shop.toml").write_text("name = \n")
    assert error_of(shop) == "SHOP/shop.toml is not TOML: Invalid value (at line 1, column 8)"


def test_a_corrupt_parquet_is_named(shop: Path) -> None:
    (shop / "items.parquet").write_bytes(b"PAR1 and then nothing")
    (shop / "shop.toml").write_text(SHOP.replace("items.csv", "items.parquet"))
    assert error_of(shop).startswith(
        "SHOP/items.parquet cannot be read: Parquet magic bytes not found in footer"
    )


def test_a_file_of_another_kind_is_named(shop: Path) -> None:
    (shop / "items.xlsx").write_bytes(b"?")
    (shop / "shop.toml").write_text(SHOP.replace("items.csv", "items.xlsx"))
    assert error_of(shop) == (
        "SHOP/items.xlsx: files end in .csv, .tsv, .txt, .jsonl, .ndjson, .parquet, .arrow, .feather, .ipc "
        "(texts also in .gz, .zst, .bz2), not '.xlsx'"
    )


def test_a_parquet_column_of_the_wrong_type_is_named(shop: Path) -> None:
    pq.write_table(
        pa.table({"item_id": [1.5, 2.0], "title": ["a", "b"], "brand": ["x", "y"], "price": [1, 2]}),
        shop / "items.parquet",
    )
    (shop / "shop.toml").write_text(SHOP.replace("items.csv", "items.parquet"))
    assert (
        error_of(shop) == "items.parquet: column 'item_id', row 1: 1.5 is no id: a number that is an id is "
        "whole, and at most 2^53 as a float"
    )


def test_a_vector_of_another_length_is_named(shop: Path) -> None:
    pq.write_table(
        pa.table({"item_id": ["a", "b", "c"], "title": ["x"] * 3, "look": [[1.0, 2.0], None, [1.0]]}),
        shop / "items.parquet",
    )
    features = 'features = [{name = "look", kind = "vector(2)"}]'
    (shop / "shop.toml").write_text(
        re.sub("features = .*", features, SHOP).replace("items.csv", "items.parquet")
    )
    assert error_of(shop) == "items.parquet: column 'look', row 3: [1.0] has 1 components; vector(2) wants 2"


def test_an_event_that_no_row_has_is_named(shop: Path) -> None:
    (shop / "interactions.csv").write_text("user_id,item_id,time,event\nu1,a,1,view\nu2,b,2,buy\n")
    (shop / "shop.toml").write_text(
        SHOP.replace('"interactions.csv"', '"interactions.csv"\nevent = "event"').replace(
            "column =", "event ="
        )
    )
    assert (
        error_of(shop)
        == "interactions.csv: task 'ctr' wants the event 'clicked', which no row has; column 'event' holds "
        "'buy', 'view'"
    )


def test_a_planted_truth_that_is_none_is_named(shop: Path) -> None:
    (shop / "shop.toml").write_text(
        SHOP.replace('"interactions.csv"', '"interactions.csv"\nplanted = "truth.npz"')
    )
    for content in (None, b"", b"PK\x03\x04 and then nothing", b"text"):
        if content is not None:
            (shop / "truth.npz").write_bytes(content)
        message = error_of(shop)
        assert message.startswith("SHOP/truth.npz cannot be read as a planted truth (")
        assert message.endswith("); generate the shop again")


@pytest.mark.parametrize("cell", ["0", "-1", "1.5", "1700000000"])
def test_a_position_that_is_none_is_named(shop: Path, cell: str) -> None:
    ends = (",place", ",1", ",2", ",", ",1", f",{cell}")
    rows = (row + end + "\n" for row, end in zip(INTERACTIONS.splitlines(), ends, strict=True))
    (shop / "interactions.csv").write_text("".join(rows))
    (shop / "shop.toml").write_text(
        SHOP.replace('"interactions.csv"', '"interactions.csv"\nposition = "place"')
    )
    assert (
        error_of(shop)
        == f"interactions.csv: column 'place', row 5: '{cell}' is no position: the first place is 1, "
        "the last 1,000,000; leave the cell empty (null) where it is unknown"
    )


@pytest.mark.parametrize("cell", ["0", "-0.5", "1.01"])
def test_a_propensity_that_is_no_chance_is_named(shop: Path, cell: str) -> None:
    ends = (",chance", ",1", ",0.001", ",", f",{cell}", ",1")
    rows = (row + end + "\n" for row, end in zip(INTERACTIONS.splitlines(), ends, strict=True))
    (shop / "interactions.csv").write_text("".join(rows))
    (shop / "shop.toml").write_text(
        SHOP.replace('"interactions.csv"', '"interactions.csv"\npropensity = "chance"')
    )
    assert error_of(shop) == (
        f"interactions.csv: column 'chance', row 4: '{cell}' is no chance above 0 and at most 1; leave the "
        "cell empty (null) where it is unknown"
    )


def test_interactions_of_absent_items_are_dropped_and_counted(shop: Path) -> None:
    (shop / "interactions.csv").write_text(INTERACTIONS + "u1,gone,60,1\nu2,lost,70,1\n")
    dataset = load_dataset(shop, now_s=NOW_S)
    assert len(dataset.histories.item_rows) == 4
    report = check_shop(shop, now_s=NOW_S)
    assert (
        report.warnings[0]
        == "2 interactions (28.6%) are left out: their items, 'gone' first, are not in items.csv"
    )


def test_check_names_missing_images_and_says_that_none_is_encoded(shop: Path) -> None:
    (shop / "shop.toml").write_text(
        SHOP.replace('{name = "price"', '{name = "photo", column = "title", kind = "image"}, {name = "price"')
    )
    (shop / "Serum").write_bytes(b"")
    report = check_shop(shop, now_s=NOW_S)
    photos = report.sections["images"]["items.photo"]
    assert photos.startswith("1 files; no encoder is named, so a build leaves them aside")
    assert "items: 2 files of the feature 'photo' are missing, 'Red Lipstick' first" in report.warnings


def test_csv_ids_keep_their_zeros_and_integers_are_decimal_text(shop: Path) -> None:
    (shop / "interactions.csv").write_text(INTERACTIONS.replace(",a,", ",007,"))
    (shop / "items.csv").write_text(ITEMS.replace("\na,", "\n007,"))
    assert load_dataset(shop, now_s=NOW_S).item_ids.tolist() == [b"007", b"b", b"c"]
    table = pa.table(
        {"user_id": np.array([10, 9]), "item_id": np.array([-1, 3]), "time": [1, 2], "clicked": [True, True]}
    )
    pq.write_table(table, shop / "interactions.parquet")
    head, tasks = (
        SHOP.replace("interactions.csv", "interactions.parquet").split("[items]")[0],
        SHOP[SHOP.index("[[tasks]]") :],
    )
    (shop / "shop.toml").write_text(head + tasks)
    dataset = load_dataset(shop, now_s=NOW_S)
    assert dataset.user_ids.tolist() == [b"10", b"9"]
    assert dataset.item_ids.tolist() == [b"-1", b"3"]


def test_a_byte_order_mark_and_iso_times_are_read(shop: Path) -> None:
    text = "\ufeff" + re.sub(r",(\d)0,", r",2001-01-0\1 12:00:00,", INTERACTIONS)
    (shop / "interactions.csv").write_text(text, "utf-8")
    assert load_dataset(shop, now_s=NOW_S).histories.times[0] == 978_350_400

"""What people write in columns, and what each reader takes it for."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from builders.shop.columns.categories import (
    lists_from_column,
    texts_from_column,
    undeclared_separator,
    warn_of_words,
    with_lists,
)
from builders.shop.columns.column import Column, Reading
from builders.shop.columns.ids import ids_from_column, known_ids, likenesses, would_join
from builders.shop.columns.labels import labels_from_column
from builders.shop.columns.numbers import numbers_from_column, vectors_from_column
from builders.shop.columns.times import times_from_column
from ensemble.errors import InvalidInput

NOW_S = 1_800_000_000.0
MOMENT = 1_701_671_020  # 2023-12-04T06:23:40Z


def column(cells, kind=None, **reading) -> Column:
    values = cells if isinstance(cells, pa.Array) else pa.array(cells, kind)
    return Column("a.csv", "c", pa.chunked_array([values]), reading=Reading(**reading))


TIMES = {
    "zulu": (["2023-12-04T06:23:40Z"], "ISO"),
    "offset": (["2023-12-04T08:23:40+02:00"], "ISO"),
    "short offset": (["2023-12-04 08:23:40 +0200"], "ISO"),
    "fraction": (["2023-12-04T06:23:40.123456789"], "ISO"),
    "comma fraction": (["2023-12-04T06:23:40,5Z"], "ISO"),
    "zones and none": (["2023-12-04T06:23:40Z", "2023-12-04 06:23:40"], "ISO"),
    "words": (["2023-12-04 06:23:40 UTC", " 2023-12-04t06:23:40z"], "ISO"),
    "seconds": ([MOMENT], "Unix seconds"),
    "seconds as text": ([str(MOMENT)], "Unix seconds"),
    "fractional seconds": ([MOMENT + 0.25], "Unix seconds"),
    "milliseconds": ([MOMENT * 1000 + 999], "Unix milliseconds"),
    "microseconds": ([MOMENT * 10**6], "Unix microseconds"),
    "nanoseconds as text": ([str(MOMENT * 10**9 + 1)], "Unix nanoseconds"),
    "moments": ([20231204062340], "calendar moments"),
    "without signs": (["20231204T062340Z", "20231204T082340+0200"], "ISO"),
    "timestamps": (pa.array([MOMENT * 1000], pa.timestamp("ms", "Europe/Berlin")), "timestamps"),
    "decimals": ([decimal.Decimal(MOMENT)], "Unix seconds"),
}


@pytest.mark.parametrize(("cells", "what"), TIMES.values(), ids=TIMES)
def test_times_are_recognised_and_said(cells, what):
    read = column(cells)
    assert set(times_from_column(read, NOW_S).tolist()) == {MOMENT}
    assert what in read.said.what
    assert read.said.low == "2023-12-04"


def test_days_and_positions_are_told_apart():
    midnight = MOMENT - 6 * 3600 - 23 * 60 - 40
    for cells in ([20231204], ["2023-12-04"], ["20231204"], [datetime.date(2023, 12, 4)]):
        assert times_from_column(column(cells), NOW_S).tolist() == [midnight]
    for cells in ([202312040623], ["202312040623"], [202312040623.0]):
        assert times_from_column(column(cells), NOW_S).tolist() == [MOMENT - 40]
    assert times_from_column(column([20231204, 7]), NOW_S).tolist() == [20231204, 7], "no day is 7"
    assert times_from_column(column([20231204], time_unit="position"), NOW_S).tolist() == [20231204]
    assert times_from_column(column([5.9, -3]), NOW_S).tolist() == [5, -3]
    assert times_from_column(column([40], time_unit="s"), NOW_S).tolist() == [40]
    assert times_from_column(column(["04/12/2023 06:23"], time_format="%d/%m/%Y %H:%M"), NOW_S) == MOMENT - 40


WRONG_TIMES = {
    "two units": (
        [MOMENT, MOMENT, MOMENT * 1000],
        "row 3: .* reads as one of Unix milliseconds, and most others",
    ),
    "no time": (
        [f"2023-12-04T06:23:4{i}Z" for i in range(3)] + ["soon"],
        "row 4: 'soon' is no time; times are",
    ),
    "day first": (["04/12/2023"], 'row 1: .*time_format = "%d/%m'),
    "future": ([int(NOW_S) + 90_000], "row 1: .* is in the future"),
    "no year of Arrow's": (["2023-12-04", "9999-12-31"], "row 2: '9999-12-31' is outside the years 1678"),
    "no year at all": (["0001-01-01T00:00:00Z"], "row 1: .* is outside the years 1678 to 2261; leave"),
    "hex": (["0x65"], "row 1: '0x65' is no time"),
    "no calendar day": (["2023-02-30"], "row 1: '2023-02-30' is no time"),
    "clock": (pa.array([1], pa.time32("s")), "has type time32"),
    "nothing": ([MOMENT, None], "row 2: the time is missing"),
    "endless": ([1.0, float("inf")], "row 2: inf is no time"),
    "kinds": (["2023-12-04", "2023-12-05", "7"], "row 3: '7' is a time of another kind"),
}


@pytest.mark.parametrize(("cells", "message"), WRONG_TIMES.values(), ids=WRONG_TIMES)
def test_what_is_no_time_is_refused_with_row_and_cure(cells, message):
    with pytest.raises(InvalidInput, match=message):
        times_from_column(column(cells), NOW_S)


IDS = {
    "text": (["b", "a"], [b"b", b"a"]),
    "integers": ([10, -1], [b"10", b"-1"]),
    "whole floats": ([10.0, 2.0], [b"10", b"2"]),
    "decimals": ([decimal.Decimal("10.00")], [b"10"]),
    "binary": ([b"a", "ü".encode()], [b"a", "ü".encode()]),
    "fixed binary": (pa.array([b"ab"], pa.binary(2)), [b"ab"]),
    "views": (pa.array(["a"], pa.string_view()), [b"a"]),
    "binary views": (pa.array([b"a"], pa.binary_view()), [b"a"]),
    "categories": (pa.array(["a", "b", "a"]).dictionary_encode(), [b"a", b"b", b"a"]),
    "blanks": ([" a", "a\t", "a"], [b"a", b"a", b"a"]),
    "zeros": (["007", "7", "7.0"], [b"007", b"7", b"7.0"]),
}


@pytest.mark.parametrize(("cells", "wanted"), IDS.values(), ids=IDS)
def test_ids_of_every_type(cells, wanted):
    ids, index = ids_from_column(column(cells))
    assert ids[index].tolist() == wanted
    assert ids.tolist() == sorted(set(wanted))


def test_words_for_nothing_are_counted_as_missing_and_named():
    read = column(["a", "NULL", "nan", "None", "", " ", None, "b", "NULL"])
    ids, index = known_ids(read)
    assert ids.tolist() == [b"a", b"b"]
    assert index.tolist() == [0, -1, -1, -1, -1, -1, -1, 1, -1]
    assert read.said.missing == 7
    assert any("'NULL'" in note and "'nan'" in note for note in read.said.notes)
    assert known_ids(column([1.0, float("nan")]))[1].tolist() == [0, -1]
    with pytest.raises(InvalidInput, match="row 2: the id is missing"):
        ids_from_column(column(["a", "NULL"]))


def test_what_r_writes_for_nothing_is_no_user_and_its_like_in_other_letters_are():
    read = column(["N1", "NA", "na", "Na", " NA"])
    ids, index = known_ids(read)
    assert ids.tolist() == [b"N1", b"Na", b"na"]
    assert index.tolist() == [0, -1, 2, 1, -1]
    assert any("'NA'" in note and "2 rows" in note for note in read.said.notes)


@pytest.mark.parametrize("cells", [[1.5], [2.0**60], [b"\xff"], [True], [{"a": 1}], [decimal.Decimal("1.5")]])
def test_what_is_no_id_is_refused(cells):
    with pytest.raises(InvalidInput, match=r"a\.csv: column 'c'"):
        ids_from_column(column(cells))


def test_ids_that_look_alike_are_named_with_counts():
    ids = np.array([b"1", b"1.0", b"A", b"a", b"007", b"7", b"x y", b"xy"])
    found = " ".join(likenesses(ids))
    for way in ("an ending .0: '1', '1.0'", "upper and lower case: 'A', 'a'", "blanks", "leading zeros"):
        assert way in found
    assert likenesses(np.array([b"a", b"b"])) == []
    assert would_join(np.array([b"1.0", b"z"]), np.array([b"1"])) == [
        "1 of them would join but for an ending .0 ('1.0')"
    ]


NUMBERS = {
    "currency": (["$10.99", "€ 5", "7 EUR", "-$3"], [10.99, 5, 7, -3]),
    "thousands": (["1,100.50", "1,100", "3"], [1100.5, 1100, 3]),
    "decimal commas": (["1.100,50", "1.100", "0,5"], [1100.5, 1100, 0.5]),
    "groups of blanks": (["1 100 200", "1\u00a0000"], [1_100_200, 1000]),
    "missing": (["1", "nan", "NULL", "", None, "NA"], [1, None, None, None, None, None]),
    "exponents": (["1e3", "-.5", "2."], [1000, -0.5, 2]),
    "truth": (["true", "False"], [1, 0]),
    "booleans": ([True, None], [1, None]),
    "NaN": ([1.0, float("nan")], [1, None]),
    "decimals": ([decimal.Decimal("1.25")], [1.25]),
    "nothing": (pa.nulls(2), [None, None]),
}


@pytest.mark.parametrize(("cells", "wanted"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_as_people_write_them(cells, wanted):
    np.testing.assert_array_equal(numbers_from_column(column(cells)), np.array(wanted, float))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["5", "1,100"], 'row 2: .* may mean two numbers.*decimal = ","'),
        (["1.5", "1,5"], "row .*another decimal sign"),
        (["1", "cheap"], "row 2: 'cheap' is no number"),
        (["1", "$"], r"row 2: '\$' is no number"),
        (["1", "1,2,3"], "row 2"),
        ([float("inf")], "row 1: inf is no finite"),
        ([[1]], "wanted numbers"),
    ],
)
def test_numbers_that_may_be_others_are_refused(cells, message):
    with pytest.raises(InvalidInput, match=message):
        numbers_from_column(column(cells))


def test_a_decimal_sign_may_be_said():
    assert numbers_from_column(column(["1,100"], decimal=",")).tolist() == [1.1]
    assert numbers_from_column(column(["1,100"], decimal=".")).tolist() == [1100]
    assert numbers_from_column(column(["1.100"], decimal=",")).tolist() == [1100]


@pytest.mark.parametrize(
    "cells",
    [
        ["yes", "NO", None],
        ["t", "f", ""],
        ["Y", "n", "nan"],
        ["True", "false", None],
        [1, 0, None],
        [True, False, None],
        ["1", "0", None],
        ["yes", "0", None],
    ],
)
def test_labels_are_words_or_numbers(cells):
    np.testing.assert_array_equal(labels_from_column(column(cells)), [1, 0, np.nan])


def test_words_of_labels_are_said_with_what_they_are():
    read = column(["yes", "No", "Y", None])
    labels_from_column(read)
    assert read.said.notes == ["'Y', 'yes' read as 1", "'No' read as 0"]


def test_a_cell_that_is_no_list_among_lists_is_named():
    read = column([f"[{i}, {i + 1}]" for i in range(9)] + ["[1, 2", ""])
    warn_of_words(with_lists(read))
    assert read.said.warnings == [
        "cells look like JSON lists, but '[1, 2' is none; each is taken as one value"
    ]
    titles = column(["[a] b", "c", "d", "[e]"])
    warn_of_words(titles)
    assert not titles.said.warnings


def test_lists_of_all_kinds_are_read():
    def of(cells, separator=None):
        read = with_lists(column(cells))
        rows, texts = lists_from_column(read, separator)
        return list(zip(rows.tolist(), texts.to_pylist(), strict=True))

    wanted = [(0, "a"), (0, "b"), (2, "c")]
    assert of([["a", "b"], None, ["c"]]) == wanted
    assert of(['["a", "b"]', None, '["c"]']) == wanted
    assert of(["['a', 'b']", "", "['c']"]) == wanted
    assert of(["a| b", None, "c"], "|") == wanted
    assert of(["[1, 2]", "[]"]) == [(0, "1"), (0, "2")]
    with pytest.raises(InvalidInput, match=r"row 2: '\[b' is no JSON list|row 2"):
        of(['["a"]', "[b]"])
    assert of(["[x", "y"]) == [(0, "[x"), (1, "y")], "a title may begin so"


def test_several_values_in_a_cell_are_noticed():
    assert undeclared_separator(column(["red|matte", "red", "matte|gloss"])) == "|"
    assert undeclared_separator(column([f"Title {i}, part {i}" for i in range(50)])) is None
    assert undeclared_separator(column(["red", "matte"])) is None


def test_texts_and_vectors():
    assert texts_from_column(column([1.0, float("nan")])).to_pylist() == ["1", None]
    assert texts_from_column(column([b"a", None])).to_pylist() == ["a", None]
    for cells in ([[1, 2], None], ["1 2", ""], ["[1.0, 2.0]", None], ["1, 2", None]):
        np.testing.assert_array_equal(vectors_from_column(column(cells), 2, None), [[1, 2], [np.nan] * 2])
    assert vectors_from_column(column(["1|2"]), 2, "|").tolist() == [[1, 2]]
    with pytest.raises(InvalidInput, match="has 1 components"):
        vectors_from_column(column(["1 2", "1"]), 2, None)

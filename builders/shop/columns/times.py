"""Reads times of a column, by the one rule of ensemble/time_rule.py: seconds, or positions that only
order."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import Column, distinct_of, first_true, is_textual, to_numpy
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.time_rule import (
    CALENDAR,
    CLOCK_SKEW_S,
    NAMES,
    UNITS,
    date_of,
    seconds_from_numbers,
    units_of,
)

CURE = (
    "times are Unix seconds (or milliseconds, …), ISO 8601 texts, timestamps, or numbers that order; another "
    'way of writing them is named by time_format = "%d/%m/%Y %H:%M" in shop.toml'
)
_UTC = pa.timestamp("ns", "UTC")
_ZONE = r"(?i)(?:[0-9]Z|[0-9:.][+-][0-9]{2}(?::?[0-9]{2})?)$"
_BASIC = r"^([0-9]{4})([0-9]{2})([0-9]{2})T([0-9]{2})([0-9]{2})([0-9]{2})"  # 20231204T062340Z
_WIDE = r"\1-\2-\3T\4:\5:\6"
# nanoseconds in 64 bits hold the years 1678 to 2261; Arrow's reader turns others into some year of these
_FAR = r"^\s*(?:0|1[0-5]|16[0-6]|167[0-7]|226[2-9]|22[7-9]|2[3-9]|[3-9])[0-9]*-"


def times_from_column(column: Column, now_s: float) -> Array:
    """Reads Unix seconds [n] int64 from numbers, timestamps or texts; refuses missing and future ones."""
    values, kind = column.values, column.values.type
    missing = first_true(to_numpy(values.is_null()))
    if missing >= 0:
        raise InvalidInput(f"{column.place(missing)}: the time is missing; fill it in, or leave the row out")
    if column.reading.time_format and is_textual(kind):
        times, what = _formatted(column, column.reading.time_format), "texts by time_format, read as UTC"
    elif is_textual(kind):
        times, what = _from_texts(column)
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        times, what = _from_temporal(values), f"{_named(column)}, UTC"
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        times, what = _from_numbers(column, _as_numbers(column))
    else:
        raise column.wrong_type(f"times; {CURE}")
    late = first_true(times > now_s + CLOCK_SKEW_S)
    if late >= 0:
        raise column.error(late, f"is in the future ({date_of(times[late])}); {CURE}")
    _say(column, times, what)
    return times


def _named(column: Column) -> str:
    """Names a column of temporal cells; a text file's were ISO texts."""
    if column.is_text:
        return "ISO texts"
    return "dates" if pa.types.is_date(column.values.type) else "timestamps"


def parsed_times(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Reads ISO texts as moments in UTC, to the nanosecond; ArrowInvalid where one is none, or is of a year
    that such moments do not reach."""
    if _any_far(texts):
        raise pa.ArrowInvalid("a year before 1678 or after 2261")
    with contextlib.suppress(pa.ArrowInvalid):
        return texts.cast(_UTC)
    with contextlib.suppress(pa.ArrowInvalid):
        return texts.cast(pa.timestamp("ns")).cast(_UTC)
    upper = pc.ascii_upper(pc.utf8_trim_whitespace(texts.cast(pa.large_string())))
    upper = pc.replace_substring_regex(upper, r" ?(UTC|GMT)$", "Z")
    upper = pc.replace_substring_regex(upper, r"([0-9]) ([+-][0-9])", r"\1\2")
    upper = pc.replace_substring_regex(upper, r",([0-9]+)", r".\1")
    upper = pc.replace_substring_regex(upper, _BASIC, _WIDE)
    zoned = pc.and_(pc.match_substring_regex(upper, _ZONE), pc.greater(pc.utf8_length(upper), 10))
    zone = pc.if_else(zoned, upper, pc.binary_join_element_wise(upper, _text("Z"), _text("")))
    # a day alone takes no zone in Arrow's reader
    day = pc.match_substring_regex(zone, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}Z$")
    return pc.if_else(day, pc.replace_substring_regex(zone, "Z$", "T00:00:00Z"), zone).cast(_UTC)


def _any_far(texts: pa.ChunkedArray | pa.Array) -> bool:
    """Says whether a text begins with a year that nanoseconds do not reach; texts of usual years are told by
    the least and the largest alone."""
    if pa.types.is_string_view(texts.type):
        texts = texts.cast(pa.large_string())
    ends = pc.min_max(texts).as_py()
    if ends["min"] is None or "1678" <= ends["min"] <= ends["max"] < "2262":
        return False
    return bool(pc.any(pc.match_substring_regex(texts, _FAR), min_count=0).as_py())


def _text(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())


def _from_texts(column: Column) -> tuple[Array, str]:
    """Reads texts that are numbers or ISO times, all of one kind; their distinct ones only."""
    texts, index = distinct_of(column.values)
    texts = texts.cast(pa.large_string())
    numbers = _numbers(texts)
    if numbers is not None:
        return _from_numbers(column, numbers[index])
    try:
        return _from_temporal(parsed_times(texts))[index], "ISO texts, UTC where they name no zone"
    except pa.ArrowInvalid:
        raise _wrong_text(column, texts, index) from None


def _numbers(texts: pa.Array) -> Array | None:
    """Gives texts [K] as numbers, int64 if all are whole, else float64; None where one is no number."""
    trimmed = pc.utf8_trim_whitespace(texts)
    if pc.any(pc.match_substring_regex(trimmed, "(?i)^[+-]?0x"), min_count=0).as_py():
        return None  # Arrow would read 0x65 as 101
    for kind in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):
            return to_numpy(trimmed.cast(kind))
    return None


def _wrong_text(column: Column, texts: pa.Array, index: Array) -> InvalidInput:
    """Finds the first row whose text is no time, or not of the kind of most."""
    is_number = np.array([_numbers(texts.slice(at, 1)) is not None for at in range(min(len(texts), 5000))])
    is_iso = np.array([_is_iso(texts.slice(at, 1)) for at in range(len(is_number))])
    neither = np.flatnonzero(~is_number & ~is_iso)
    if len(neither):
        row = first_true(np.isin(index, neither))
        if _any_far(texts.slice(int(index[row]), 1)):
            return column.error(row, "is outside the years 1678 to 2261; leave such rows out")
        return column.error(row, f"is no time; {CURE}")
    if not len(is_number) < len(texts):
        few = is_number if is_number.sum() <= is_iso.sum() else is_iso
        row = first_true(np.isin(index, np.flatnonzero(few)))
        return column.error(row, "is a time of another kind than the others; write all times alike")
    for start in range(0, len(texts), 5000):
        try:
            parsed_times(texts.slice(start, 5000))
        except pa.ArrowInvalid:
            one = next(at for at in range(start, len(texts)) if not _is_iso(texts.slice(at, 1)))
            return column.error(first_true(index == one), f"is no time; {CURE}")
    return column.error(0, f"is no time; {CURE}")


def _is_iso(texts: pa.Array) -> bool:
    with contextlib.suppress(pa.ArrowInvalid):
        return parsed_times(texts) is not None
    return False


def _formatted(column: Column, form: str) -> Array:
    """Reads texts by a format of strptime."""
    texts, index = distinct_of(column.values)
    try:
        parsed = pc.strptime(texts.cast(pa.large_string()), format=form, unit="s", error_is_null=True)
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"time_format = {form!r} is none: {str(error).splitlines()[0]}") from None
    wrong = np.flatnonzero(to_numpy(parsed.is_null()))
    if len(wrong):
        raise column.error(first_true(np.isin(index, wrong)), f"is no time of the format {form!r}")
    return _from_temporal(parsed)[index]


def _from_temporal(values: pa.ChunkedArray | pa.Array) -> Array:
    """Gives timestamps and dates as whole seconds [n] int64."""
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s"))
    numbers = to_numpy(values.cast(pa.int64()))
    return numbers // {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]


def _as_numbers(column: Column) -> Array:
    """Gives a column of numbers as int64 or float64, all finite."""
    values = column.values
    if pa.types.is_integer(values.type):
        try:
            return to_numpy(values.cast(pa.int64()))
        except pa.ArrowInvalid:
            pass
    numbers = to_numpy(values.cast(pa.float64(), safe=False)).astype(np.float64)
    wrong = first_true(~np.isfinite(numbers))
    if wrong >= 0:
        raise column.error(wrong, f"is no time; {CURE}")
    return numbers


def _from_numbers(column: Column, numbers: Array) -> tuple[Array, str]:
    """Reads numbers [n] of one unit: the one that shop.toml names, else the one that their sizes say."""
    wrong = first_true(~np.isfinite(numbers)) if numbers.dtype.kind == "f" else -1
    if wrong >= 0:
        raise column.error(wrong, f"is no time; {CURE}")
    unit = column.reading.time_unit
    if unit is None and len(numbers):
        units = units_of(numbers)
        counts = np.bincount(units, minlength=len(UNITS))
        if counts[UNITS.index("day")] < len(units):  # a position may look like a day
            units[units == UNITS.index("day")] = UNITS.index("position")
            counts = np.bincount(units, minlength=len(UNITS))
        unit = UNITS[int(counts.argmax())]
        wrong = first_true(units != UNITS.index(unit))
        if wrong >= 0:
            raise _mixed(column, wrong, UNITS[int(units[wrong])], unit)
    elif unit in CALENDAR:
        wrong = first_true(units_of(numbers) != UNITS.index(unit))
        if wrong >= 0:
            raise column.error(wrong, f"is none of {NAMES[unit]}, as time_unit = {unit!r} wants")
    unit = unit or "position"
    seconds = seconds_from_numbers(numbers, unit)
    return np.floor(np.clip(seconds, -(2.0**62), 2.0**62)).astype(np.int64) if (
        seconds.dtype.kind == "f"
    ) else seconds, NAMES[unit]  # fmt: skip


def _mixed(column: Column, row: int, came: str, most: str) -> InvalidInput:
    """Makes the error for a time whose size says another unit than the others'."""
    wanted = came if most == "position" else most
    return column.error(
        row,
        f"reads as one of {NAMES[came]}, and most others as {NAMES[most]}; correct it, or say which all are: "
        f'time_unit = "{wanted}" (or "position", numbers that only order)',
    )


def _say(column: Column, times: Array, what: str) -> None:
    """Says what the times were taken for, and their range."""
    said = column.said
    said.what = f"times: {what}"
    if len(times):
        low, high = int(times.min()), int(times.max())
        is_clock = not what.startswith("positions")
        said.low, said.high = (date_of(one) if is_clock else f"{one:,}" for one in (low, high))

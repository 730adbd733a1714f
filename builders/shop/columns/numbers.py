"""Reads numbers: plain ones, and prices as people write them ($1,100.50; 1.100,50 €) where that is
unambiguous."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import (
    Column,
    are_missing,
    cast,
    distinct_of,
    first_true,
    is_list,
    is_textual,
    plain,
    to_numpy,
)
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

MAX_POSITION = 1_000_000  # a larger number is an id or a time, not a place in a list
_CURRENCY = (
    r"(?i)^([+-]?)\s*(?:US\$|[$€£¥₹₩₽]|USD|EUR|GBP|CHF|JPY|CNY)\s*|\s*(?:[$€£¥₹₩₽]|USD|EUR|GBP|CHF|JPY|CNY)$"
)
_POINT = r"^[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?$"
_COMMA = r"^[+-]?(?:[0-9]{1,3}(?:[.][0-9]{3})+|[0-9]*)(?:,[0-9]*)?$"
_PLAIN = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"
_GROUP = r"([0-9])[ \x{00A0}\x{202F}'’]([0-9]{3})"
# Only one way of reading these is left: 1,100 alone may be either number
_SURE_POINT = r",[0-9]{3}[.,]|^[+-]?[0-9]{1,3}(?:,[0-9]{3}){2,}$"
_SURE_COMMA = r"\.[0-9]{3}[.,]|,[0-9]{0,2}$|,[0-9]{4,}$|^[+-]?[0-9]{4,},[0-9]*$|^[+-]?0,"
_WAYS = {".": "thousands by commas", ",": "decimal commas"}


def numbers_from_column(column: Column) -> Array:
    """Reads numbers [n] float64, NaN where the cell is empty or says so (nan, NULL, None, NA); infinities are
    refused."""
    kind = column.values.type
    if pa.types.is_null(kind):
        numbers = np.full(len(column.values), np.nan)
    elif is_textual(kind):
        numbers = _from_texts(column)
    elif pa.types.is_boolean(kind):
        numbers = to_numpy(column.values.cast(pa.int8()).cast(pa.float64()))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = to_numpy(cast(column, column.values, pa.float64(), "is no number")).astype(np.float64)
    else:
        raise column.wrong_type("numbers")
    endless = first_true(np.isinf(numbers))
    if endless >= 0:
        raise column.error(
            endless, "is no finite number; leave the cell empty (null) where a value is missing"
        )
    _say(column, numbers)
    return numbers


def _say(column: Column, numbers: Array) -> None:
    """Says that a column was taken for numbers, and their range."""
    known = numbers[~np.isnan(numbers)]
    column.said.what, column.said.missing = "numbers", len(numbers) - len(known)
    if len(known):
        column.said.low, column.said.high = (f"{one:g}" for one in (known.min(), known.max()))


def _from_texts(column: Column) -> Array:
    """Reads texts as numbers, their distinct ones only."""
    texts, index = distinct_of(column.values)
    texts = pc.utf8_trim_whitespace(texts.cast(pa.large_string()))
    missing = to_numpy(are_missing(texts)).astype(bool)
    _note_missing(column, texts, missing, index)
    lower = pc.utf8_lower(texts)
    truth = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", texts))
    written = truth.filter(pa.array(~missing))
    is_plain = to_numpy(pc.match_substring_regex(written, _PLAIN)).astype(bool)
    if not is_plain.all() or column.reading.decimal == ",":
        written = _unwrapped(column, written, np.flatnonzero(~missing), index)
    numbers = np.full(len(texts) + 1, np.nan)
    numbers[:-1][~missing] = to_numpy(written.cast(pa.float64()))
    return numbers[index]


def _note_missing(column: Column, texts: pa.Array, missing: Array, index: Array) -> None:
    words = [text for text in texts.filter(pa.array(missing)).to_pylist() if text]
    if words:
        counts = np.bincount(index + 1, minlength=len(texts) + 1)[1:]
        column.said.note(
            f"{', '.join(map(repr, words))} read as missing: {int(counts[missing].sum()):,} rows"
        )


def _unwrapped(column: Column, written: pa.Array, places: Array, index: Array) -> pa.Array:
    """Takes currency signs and thousands off the texts [K], and puts points for decimal commas; `places` [K]
    are theirs among the distinct ones that `index` [n] names."""

    def wrong(mask: Array, rule: str) -> InvalidInput:
        return column.error(first_true(np.isin(index, places[mask])), rule)

    bare = pc.replace_substring_regex(written, _CURRENCY, r"\1")
    if not pc.all(pc.equal(bare, written), min_count=0).as_py():
        column.said.note("currency signs taken off")
    for _ in range(2):  # groups overlap by a digit
        bare = pc.replace_substring_regex(bare, _GROUP, r"\1\2")
    exponent = to_numpy(pc.match_substring_regex(bare, _PLAIN)).astype(bool)
    has_comma = to_numpy(pc.match_substring(bare, ",")).astype(bool)
    fits = {
        ".": to_numpy(pc.match_substring_regex(bare, _POINT)).astype(bool) | exponent,
        ",": to_numpy(pc.match_substring_regex(bare, _COMMA)).astype(bool) | (exponent & ~has_comma),
    }
    no_digit = ~to_numpy(pc.match_substring_regex(bare, "[0-9]")).astype(bool)
    neither = no_digit | ~(fits["."] | fits[","])
    if neither.any():
        raise wrong(neither, "is no number")
    decimal = column.reading.decimal or _decimal_of(column, bare, has_comma, wrong)
    if not fits[decimal].all():
        raise wrong(~fits[decimal], f"is no number with the decimal sign {decimal!r} that the others have")
    if has_comma.any():
        column.said.note(f"read with {_WAYS[decimal]}")
    if decimal == ".":
        return pc.replace_substring(bare, ",", "")
    return pc.replace_substring(pc.replace_substring(bare, ".", ""), ",", ".")


def _decimal_of(column: Column, bare: pa.Array, has_comma: Array, wrong) -> str:  # type: ignore[no-untyped-def]
    """Finds the one decimal sign that all numbers allow; refuses a column that allows two, or none."""
    if not has_comma.any():
        many = to_numpy(pc.match_substring_regex(bare, r"\..*\.")).astype(bool)
        return "," if many.any() else "."
    sure_point = to_numpy(pc.match_substring_regex(bare, _SURE_POINT)).astype(bool)
    sure_point |= to_numpy(pc.match_substring_regex(bare, r"\.(?:[0-9]{1,2}|[0-9]{4,})$")).astype(bool)
    sure_comma = to_numpy(pc.match_substring_regex(bare, _SURE_COMMA)).astype(bool)
    if sure_point.any() and sure_comma.any():
        few = sure_point if sure_point.sum() < sure_comma.sum() else sure_comma
        raise wrong(few, "has another decimal sign than the others; write all numbers alike")
    if not sure_point.any() and not sure_comma.any():
        raise wrong(
            has_comma,
            'may mean two numbers, and no other cell tells which; say it in shop.toml: decimal = "." '
            "(then its "
            'comma groups thousands) or decimal = ","',
        )
    return "." if sure_point.any() else ","


def positions_from_column(column: Column) -> Array:
    """Reads places in a shown list [n] int64, 1 = first; 0 where the cell is empty.

    A 0 in the file is refused: it may be a first place counted from 0, or an unknown one.
    """
    numbers = numbers_from_column(column)
    places = np.where(np.isnan(numbers), 1.0, numbers)
    wrong = first_true((places < 1) | (places > MAX_POSITION) | (places != np.floor(places)))
    if wrong >= 0:
        raise column.error(
            wrong,
            f"is no position: the first place is 1, the last {MAX_POSITION:,}; leave the cell empty (null) "
            "where it is unknown",
        )
    column.said.what = "positions in a list"
    return np.where(np.isnan(numbers), 0.0, numbers).astype(np.int64)


def chances_from_column(column: Column) -> Array:
    """Reads chances [n] float64, above 0 and at most 1; NaN where the cell is empty."""
    chances = numbers_from_column(column)
    wrong = first_true((chances <= 0) | (chances > 1))
    if wrong >= 0:
        raise column.error(
            wrong, "is no chance above 0 and at most 1; leave the cell empty (null) where it is unknown"
        )
    column.said.what = "chances"
    return chances


def vectors_from_column(column: Column, dim: int, separator: str | None) -> Array:
    """Reads vectors [n, dim] float64, NaN rows where empty; each must have `dim` finite components."""
    if is_list(column):
        lists = pa.chunked_array(
            [chunk.cast(pa.large_list(chunk.type.value_type)) for chunk in column.values.chunks],
            pa.large_list(column.values.type.value_type),
        ).combine_chunks()
        flat_column = pc.list_flatten(lists)
        length = to_numpy(pc.fill_null(pc.list_value_length(lists), 0))
    elif is_textual(column.values.type) or pa.types.is_null(column.values.type):
        bare = pc.utf8_trim_whitespace(pc.replace_substring_regex(plain(column.values), r"^\s*\[|\]\s*$", ""))
        sign = separator if separator and separator.strip() else None
        if sign is None and pc.any(pc.match_substring(bare, ",")).as_py():
            sign = ","
        lists = (
            pc.split_pattern(bare, pattern=sign) if sign else pc.utf8_split_whitespace(bare)
        ).combine_chunks()
        empty = to_numpy(pc.fill_null(pc.equal(bare, ""), True)).astype(bool)
        length = np.where(empty, 0, to_numpy(pc.fill_null(pc.list_value_length(lists), 0)))
        flat_column = pc.utf8_trim_whitespace(pc.list_flatten(lists.filter(pa.array(~empty))))
    else:
        raise column.wrong_type(f"lists of {dim} numbers")
    wrong = first_true((length != dim) & (length > 0))
    if wrong >= 0:
        raise column.error(wrong, f"has {length[wrong]} components; vector({dim}) wants {dim}")
    return _laid_out(column, flat_column, length, dim)


def _laid_out(column: Column, cells: pa.Array, length: Array, dim: int) -> Array:
    """Lays the components of all vectors, in one line, out as [n, dim]."""
    flat = numbers_from_column(Column(column.file, column.name, plain(pa.chunked_array([cells]))))
    if np.isnan(flat).any():
        raise column.error(
            int(np.flatnonzero(length)[first_true(np.isnan(flat)) // dim]), "holds an empty component"
        )
    vectors = np.full((len(length), dim), np.nan)
    vectors[length > 0] = flat.reshape(-1, dim)
    column.said.what, column.said.missing = f"vectors of {dim}", int((length == 0).sum())
    return vectors

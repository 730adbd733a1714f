"""Reads texts and categories: single values, lists, JSON lists, and texts that a separator splits."""

from __future__ import annotations

import io
from dataclasses import replace

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
    shown,
    to_numpy,
)
from ensemble.arrays import Array

_SIGNS = ("|", ";", ",")  # that separate values in one cell
_JSON_LIST = r"^\s*\[.*\]\s*$"
_LOOKS_LIKE = 0.2  # share of distinct cells with such a sign, from which a column looks like several values
_PARTS_ARE = 0.5  # parts are few: at most this many distinct ones for each distinct cell


def texts_from_column(column: Column) -> pa.LargeStringArray:
    """Reads texts [n], null where empty; whole numbers become decimal text, booleans true and false."""
    values, kind = column.values, column.values.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):  # pandas writes integers with gaps as floats
        if pa.types.is_floating(kind):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values)
        values = cast(column, values, pa.int64(), "is no category: use text or whole numbers")
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        values = cast(column, values.cast(pa.large_binary()), pa.large_string(), "is no UTF-8 text")
    elif not (
        is_textual(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise column.wrong_type("text, integers or booleans")
    texts = plain(values).cast(pa.large_string()).combine_chunks()
    column.said.what = column.said.what or "texts"
    column.said.missing = texts.null_count
    return texts


def lists_from_column(column: Column, separator: str | None) -> tuple[Array, pa.LargeStringArray]:
    """Lays all rows' values in one line: their rows [m] int64 ascending, their texts [m], none empty."""
    if is_list(column):
        values = pa.chunked_array(
            [chunk.cast(pa.large_list(chunk.type.value_type)) for chunk in column.values.chunks],
            pa.large_list(column.values.type.value_type),
        )
        lists = values.combine_chunks()
        rows, flat = to_numpy(pc.list_parent_indices(lists)), pc.list_flatten(lists)
        texts = texts_from_column(Column(column.file, column.name, plain(pa.chunked_array([flat]))))
        what = "categories, lists"
        column.said.missing = column.values.null_count
    else:
        texts = texts_from_column(column)
        rows, what = np.arange(len(texts)), "categories"
        if separator is not None:
            lists = pc.split_pattern(texts, pattern=separator)
            rows, texts = (
                to_numpy(pc.list_parent_indices(lists)),
                pc.utf8_trim_whitespace(pc.list_flatten(lists)),
            )
            what = f"categories, several a cell by {separator!r}"
    column.said.what = what
    keep = pc.fill_null(pc.not_equal(texts, ""), False)
    return rows[to_numpy(keep).astype(bool)].astype(np.int64), texts.filter(keep)


def with_lists(column: Column) -> Column:
    """Gives a column whose cells are JSON lists ("[1, 2]", or ['a', 'b'] as Python writes them) as one of
    lists; any other stays as it is."""
    if not is_textual(column.values.type):
        return column
    texts, index = distinct_of(column.values)
    texts = pc.utf8_trim_whitespace(texts.cast(pa.large_string()))
    is_json = pc.match_substring_regex(texts, _JSON_LIST)
    empty = pc.equal(texts, "")
    if not pc.any(is_json, min_count=0).as_py() or not pc.all(pc.or_(is_json, empty)).as_py():
        return column
    lists = _lists(pc.if_else(empty, "null", texts))
    if lists is None:
        wrong = [at for at in range(len(texts)) if _lists(texts.slice(at, 1)) is None]
        if not wrong:  # each alone is one: texts here, numbers there
            raise column.error(0, "and the other lists hold values of several kinds; write all as texts")
        raise column.error(first_true(np.isin(index, wrong)), "is no JSON list of texts or of whole numbers")
    column.said.note("JSON lists read as lists")
    taken = lists.take(pa.array(index, mask=index < 0))
    return replace(column, values=pa.chunked_array([taken], lists.type))


def _lists(texts: pa.Array) -> pa.Array | None:
    """Reads JSON lists [K] in one call of Arrow's reader; None where that cannot be."""
    from pyarrow import json

    parts, ends = ([pa.scalar(one, texts.type) for one in of] for of in (['{"v":'], ["}", ""]))
    for cells in (texts, pc.replace_substring(texts, "'", '"')):
        lines = "\n".join(pc.binary_join_element_wise(*parts, cells, *ends).to_pylist()).encode()
        options = json.ReadOptions(use_threads=False, block_size=max(1 << 20, len(lines) + 1))
        try:
            table = json.read_json(io.BytesIO(lines), options)
        except pa.ArrowInvalid:
            continue
        if table.num_rows != len(texts):
            continue
        values = table.column("v").combine_chunks()
        if pa.types.is_null(values.type) or (
            pa.types.is_list(values.type) and pa.types.is_null(values.type.value_type)
        ):
            return pa.nulls(len(texts), pa.list_(pa.string()))
        if pa.types.is_list(values.type):
            kind = values.type.value_type
            return values.cast(pa.list_(pa.string())) if pa.types.is_timestamp(kind) else values
    return None


def undeclared_separator(column: Column) -> str | None:
    """Finds the sign that seems to separate several values in the cells of a text column; None where the
    cells look single: few hold the sign, or their parts are as varied as the cells."""
    if not is_textual(column.values.type):
        return None
    texts = distinct_of(column.values)[0].cast(pa.large_string())
    for sign in _SIGNS:
        if not len(texts) or pc.mean(pc.match_substring(texts, sign)).as_py() < _LOOKS_LIKE:
            continue
        parts = pc.utf8_trim_whitespace(pc.list_flatten(pc.split_pattern(texts, sign)))
        if len(parts.unique()) <= max(_PARTS_ARE * len(texts), 2) or (sign == "|" and len(texts) < 20):
            return sign
    return None


def _unlike_lists(texts: pa.Array) -> str | None:
    """Finds the first of distinct texts [K] that is no JSON list, where most others are; None elsewhere."""
    is_json = pc.match_substring_regex(texts, _JSON_LIST)
    others = texts.filter(pc.invert(pc.or_(is_json, pc.equal(pc.utf8_trim_whitespace(texts), ""))))
    return others[0].as_py() if 0 < len(others) <= len(texts) / 2 else None


def warn_of_words(column: Column) -> None:
    """Warns of words in a category's cells that usually say that a value is missing, and of several values in
    one cell."""
    if not is_textual(column.values.type):
        return
    texts, index = distinct_of(column.values)
    words = are_missing(texts.cast(pa.large_string()))
    named = [text for text in texts.filter(words).to_pylist() if text]
    if named:
        rows = int(np.isin(index, np.flatnonzero(to_numpy(words))).sum())
        column.said.warn(
            f"{shown(named)} count as values ({rows:,} rows); leave cells empty where one is missing"
        )
    if half := _unlike_lists(texts.cast(pa.large_string())):
        column.said.warn(f"cells look like JSON lists, but {half!r} is none; each is taken as one value")
    elif sign := undeclared_separator(column):
        column.said.warn(f"cells look like several values each; write separator = {sign!r} if so")

"""Reads ids of users and items, mends what is only a way of writing, and finds ids that look like others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import (
    Column,
    are_missing,
    distinct_of,
    first_true,
    is_textual,
    shown,
    to_numpy,
)
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.id_rule import MAX_ID_BYTES, id_fault

_WANTED = "text, whole numbers or UTF-8 bytes, for ids"


def ids_from_column(column: Column) -> tuple[Array, Array]:
    """Gives the distinct ids [K] S in byte order, and the index of each row's id [n] int64; InvalidInput
    where one is missing."""
    ids, index = known_ids(column)
    missing = first_true(index < 0)
    if missing >= 0:
        raise InvalidInput(f"{column.place(missing)}: the id is missing")
    return ids, index


def known_ids(column: Column) -> tuple[Array, Array]:
    """Gives the distinct ids [K] S in byte order, and the index of each row's id [n] int64, -1 where it is
    missing: an empty cell, or a word for one (nan, NULL, None, NA), which is counted."""
    if pa.types.is_nested(column.values.type):
        raise column.wrong_type(_WANTED)
    values, index = distinct_of(column.values)
    texts = _texts(column, values, index)
    _check(column, texts, index)
    texts, index = _trimmed(column, texts, index)
    names = texts.cast(pa.large_binary())
    distinct, place = np.unique(
        np.array(names.to_pylist(), dtype="S") if len(names) else np.zeros(0, "S1"), return_inverse=True
    )
    rank = np.append(place.astype(np.int64), -1)[index]
    said = column.said
    said.what, said.missing = f"ids: {len(distinct):,} distinct", int((rank < 0).sum())
    if len(distinct):
        said.low, said.high = (distinct[at].decode() for at in (0, -1))
    return distinct, rank


def with_text_ids(column: Column, ids: Array, index: Array) -> Column:
    """Gives the id column as text, as it was read: ids [K] S, index [n] int64."""
    texts = pa.array(ids.tolist(), pa.large_binary()).cast(pa.large_string())
    return replace(column, values=pa.chunked_array([texts.take(pa.array(index))]))


def _texts(column: Column, values: pa.Array, index: Array) -> pa.Array:
    """Gives distinct values [K] as text, null where a value is a NaN; refuses what is no id at all."""
    kind = values.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _whole(column, values, index)
    if pa.types.is_integer(kind) or pa.types.is_null(kind) or is_textual(kind):
        return values.cast(pa.large_string())
    if pa.types.is_fixed_size_binary(kind):
        values, kind = values.cast(pa.large_binary()), pa.large_binary()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        try:
            return values.cast(pa.large_binary()).cast(pa.large_string())
        except pa.ArrowInvalid:
            wrong = [at for at, value in enumerate(values.to_pylist()) if not _is_utf8(value)]
            row = first_true(np.isin(index, wrong))
            raise column.error(row, "is no id: its bytes are no UTF-8 text; write them as hex") from None
    raise column.wrong_type(_WANTED)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole(column: Column, values: pa.Array, index: Array) -> pa.Array:
    """Gives whole floats and decimals [K] as decimal text, null for NaN."""
    if pa.types.is_floating(values.type):
        numbers = to_numpy(values.cast(pa.float64()))
        wrong = ~np.isnan(numbers) & ~((np.floor(numbers) == numbers) & (np.abs(numbers) <= 2**53))
        texts = values.cast(pa.float64()) if wrong.any() else _int_texts(numbers)
    else:
        floors = pc.floor(values)
        wrong = to_numpy(pc.not_equal(values, floors))
        texts = values if wrong.any() else pc.replace_substring_regex(
            floors.cast(pa.large_string()), r"\.0*$", ""
        )  # fmt: skip
    if wrong.any():
        row = first_true(np.append(wrong, False)[index])
        raise column.error(row, "is no id: a number that is an id is whole, and at most 2^53 as a float")
    column.said.note(f"{values.type} read as whole numbers")
    return texts


def _int_texts(numbers: Array) -> pa.Array:
    whole = np.where(np.isnan(numbers), 0, numbers).astype(np.int64)
    return pa.array(whole, mask=np.isnan(numbers)).cast(pa.large_string())


def _check(column: Column, texts: pa.Array, index: Array) -> None:
    """Raises InvalidInput for the first of `texts` [K] that is no id; row i has texts[index[i]]."""
    names = texts.cast(pa.large_binary())
    bad = pc.or_(pc.greater(pc.binary_length(names), MAX_ID_BYTES), pc.match_substring(names, b"\x00"))
    which = np.flatnonzero(to_numpy(bad.fill_null(False)))
    if len(which):
        row = first_true(np.isin(index, which))
        fault = id_fault(names[int(index[row])].as_py())
        raise column.error(row, f"is no id: {fault}")


def _trimmed(column: Column, texts: pa.Array, index: Array) -> tuple[pa.Array, Array]:
    """Takes blanks off the ends, and leaves missing ones out; says how many rows that was."""
    counts = np.bincount(index + 1, minlength=len(texts) + 1)[1:]
    trimmed = pc.utf8_trim_whitespace(texts)
    missing = to_numpy(pc.or_(are_missing(texts), texts.is_null())).astype(bool)
    blank = to_numpy(pc.not_equal(trimmed, texts).fill_null(False)).astype(bool) & ~missing
    if blank.any():
        column.said.note(
            f"blanks taken off the ends of {int(counts[blank].sum()):,} ids, "
            f"{texts[int(blank.argmax())].as_py()!r} first"
        )
    named = missing & to_numpy(texts.is_valid()).astype(bool) & (counts > 0)
    if named.any():
        words = [repr(text) for text in texts.filter(pa.array(named)).to_pylist()]
        column.said.note(f"{', '.join(words[:5])} read as missing: {int(counts[named].sum()):,} rows")
    place = np.append(np.where(missing, -1, np.cumsum(~missing) - 1), -1)
    return trimmed.filter(pa.array(~missing)), place[index]


# --- ids that look like each other ---

WAYS = {
    "an ending .0": lambda texts: pc.replace_substring_regex(texts, r"^([0-9]+)\.0+$", r"\1"),
    "upper and lower case": pc.utf8_lower,
    "blanks": lambda texts: pc.replace_substring_regex(texts, r"\s+", ""),
    "leading zeros": lambda texts: pc.replace_substring_regex(texts, r"^0+([0-9]+)$", r"\1"),
}


def likenesses(ids: Array) -> list[str]:
    """Says how many distinct ids [K] S differ from others only in a way of writing, with examples."""
    texts = _as_text(ids)
    found = []
    for way, change in WAYS.items():
        changed = change(texts)
        counts = pc.value_counts(changed)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            alike = texts.filter(pc.is_in(changed, value_set=twice))
            pair = texts.filter(pc.equal(changed, twice[0])).to_pylist()
            found.append(f"{len(alike):,} ids differ from others only by {way}: {shown(pair)}")
    return found


def would_join(absent: Array, known: Array) -> list[str]:
    """Says how many of the `absent` ids [A] S would be among `known` ids [K] S if they were written alike."""
    lost, there = _as_text(absent), _as_text(known)
    found = []
    for way, change in WAYS.items():
        joins = pc.is_in(change(lost), value_set=change(there))
        if count := pc.sum(joins).as_py():
            first = lost.filter(joins)[0].as_py()
            found.append(f"{count:,} of them would join but for {way} ({first!r})")
    return found


def _as_text(ids: Array) -> pa.Array:
    return pa.array(ids.tolist(), pa.large_binary()).cast(pa.large_string())

"""Puts what was said of items while they were served, the catalogue's log, over the shop's files.

The log wins over the files: what was changed while it was served stays changed, whatever is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from builders.shop.columns.categories import texts_from_column
from builders.shop.columns.column import Column, is_list, is_textual, plain
from builders.shop.columns.ids import ids_from_column
from builders.shop.shop_toml import Entities
from ensemble.arrays import Array
from ensemble.live.catalogue import DELETE, REPLACE, UPDATE, Entry
from ensemble.release.ids import IdMap

_TITLE = "title"  # the log's name of the title column, whatever the shop calls it
_KEPT = object()  # the cell of the file stays


@dataclass
class Applied:
    """Counts what became of the log's items."""

    added: int = 0
    changed: int = 0
    deleted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # values that do not fit, by column and reason

    def line(self) -> str:
        """Says it in one line; empty where nothing was changed."""
        if not self.added + self.changed + self.deleted:
            return ""
        odd = "".join(f"; {count} values of {reason}" for reason, count in sorted(self.left_out.items()))
        return f"items from the log: {self.added} added, {self.changed} changed, {self.deleted} deleted{odd}"


@dataclass(frozen=True)
class _Places:
    """Says which row of the new table comes from where: [m] int64, rows of the file, or `num_rows` and more
    for the k-th of `entries`."""

    num_rows: int
    source: Array
    entries: list[Entry]
    rows: Array  # [entries] int64: each one's row in the file, -1 where it is new


def changed_columns(
    columns: dict[str, Column], table: Entities, changes: Mapping[str, Entry], applied: Applied
) -> dict[str, Column]:
    """Gives a table's columns with the changes in them, and counts them in `applied`."""
    if not changes:
        return columns
    places = _places(columns[table.id], changes, applied)
    kinds: dict[str, set[str]] = {}
    separators = {f.source: f.separator for f in table.features}
    for feature in table.features:
        kinds.setdefault(feature.source, set()).add(feature.kind.partition("(")[0])
    out = {}
    for name, column in columns.items():
        if name == table.id:
            out[name] = _ids(column, places)
            continue
        base = _comparable(column, kinds.get(name, set()))
        key = _TITLE if name == table.title and name not in kinds else name
        out[name] = _replaced(base, separators.get(name), key, places, applied)
    return out


def changed_ids(ids: Array, changes: Mapping[str, Entry], applied: Applied) -> Array:
    """Gives the ids [I] S, sorted, of a shop without an items file, with the changes in them."""
    known = set(ids.tolist())
    deleted = {item.encode() for item, entry in changes.items() if entry.kind == DELETE} & known
    added = {item.encode() for item, e in changes.items() if e.kind not in (DELETE, UPDATE)} - known
    applied.deleted, applied.added = len(deleted), len(added)
    return np.array(sorted((known - deleted) | added), dtype="S") if deleted or added else ids


def _places(column: Column, changes: Mapping[str, Entry], applied: Applied) -> _Places:
    """Finds the changed items in the file, and lays out the new table."""
    ids, index = ids_from_column(column)
    row_of = np.full(len(ids) + 1, -1, np.int64)
    row_of[index + 1] = np.arange(len(index))
    names = np.array([item.encode() for item in changes])
    rows = row_of[IdMap(ids).rows_from_ids(names)]
    kinds = np.array([entry.kind for entry in changes.values()])
    here = rows >= 0
    gone, put = (kinds == DELETE) & here, (kinds != DELETE) & (here | (kinds != UPDATE))
    applied.deleted, applied.changed = int(gone.sum()), int((put & here).sum())
    applied.added = int((put & ~here).sum())
    source, entries = (
        np.arange(len(index)),
        [e for e, is_put in zip(changes.values(), put, strict=True) if is_put],
    )
    put_rows = rows[put]
    source[put_rows[put_rows >= 0]] = len(index) + np.flatnonzero(put_rows >= 0)
    source = np.concatenate([np.delete(source, rows[gone]), len(index) + np.flatnonzero(put_rows < 0)])
    return _Places(len(index), source, entries, put_rows)


def _ids(column: Column, places: _Places) -> Column:
    """Gives the id column of the new table, as text."""
    names = pa.chunked_array([pa.array([e.item_id for e in places.entries], pa.large_string())])
    return _taken(replace(column, values=column.values.cast(pa.large_string())), names, places)


def _comparable(column: Column, kinds: set[str]) -> Column:
    """Gives a column in the type in which values of JSON can stand beside its own."""
    values, kind = column.values, column.values.type
    if is_list(column):
        wanted = pa.large_list(pa.float64() if "vector" in kinds else pa.large_string())
        return replace(column, values=values.cast(wanted))
    if is_textual(kind):
        return replace(column, values=plain(values))
    if kinds & {"number", "vector"}:
        if pa.types.is_boolean(kind):
            values = values.cast(pa.int8())
        return replace(column, values=values.cast(pa.float64()))
    return replace(column, values=pa.chunked_array([texts_from_column(column)]))


def _replaced(column: Column, separator: str | None, key: str, places: _Places, applied: Applied) -> Column:
    """Gives a column of the new table: the log's values where it has any, else the file's."""
    new, kept = [], []
    for place, entry in enumerate(places.entries):
        value = entry.values.get(key, None if entry.kind == REPLACE or places.rows[place] < 0 else _KEPT)
        if value is not _KEPT and value is not None:
            try:
                value = _fitting(value, column.values.type, separator)
            except (TypeError, ValueError):
                applied.left_out[f"{column.name} do not fit its column"] += 1
                value = _KEPT if places.rows[place] >= 0 else None
        if value is _KEPT:
            kept.append(place)
        new.append(None if value is _KEPT else value)
    source = places.source.copy()
    if kept:
        own = np.arange(len(new))
        own[kept] = -1
        back = np.where(own >= 0, places.num_rows + own, places.rows)
        of_log = source >= places.num_rows
        source[of_log] = back[source[of_log] - places.num_rows]
    values = pa.chunked_array([pa.array(new, column.values.type)])
    return _taken(column, values, replace(places, source=source))


def _taken(column: Column, new: pa.ChunkedArray, places: _Places) -> Column:
    """Takes the new table's cells from the file's and the log's."""
    both = pa.chunked_array([*column.values.chunks, *new.chunks], column.values.type)
    return replace(column, values=both.take(pa.array(places.source)))


def _fitting(value: Any, kind: pa.DataType, separator: str | None) -> Any:
    """Gives a value of JSON as a cell of the column's type."""
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_large_list(kind):
        is_number = pa.types.is_floating(kind.value_type)
        parts = value if isinstance(value, list) else [value]
        if is_number and isinstance(value, str):
            parts = value.split(separator or " ")
        return [float(part) if is_number else _text(part) for part in parts]
    if isinstance(value, list):
        numbers = all(isinstance(part, int | float) for part in value)
        if separator is None and not numbers:
            return _text(value[0]) if value else None  # a column of single values has no room for more
        return (separator or " ").join(map(_text, value))
    return _text(value)


def _text(value: Any) -> str:
    """Gives a value's text as a file would have it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise TypeError(f"no text: {value!r}")
    return repr(value) if isinstance(value, float) else str(value)

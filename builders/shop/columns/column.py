"""Holds one column of a shop's file, where it stands, and what it was taken for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.id_rule import MISSING_AS_WRITTEN, MISSING_WORDS


@dataclass(frozen=True)
class Reading:
    """Says how a file's cells are to be read, where shop.toml says it; None leaves it to what the file
    shows."""

    separator: str | None = None
    encoding: str | None = None
    decimal: str | None = None  # "." or ","
    time_unit: str | None = None  # a key of ensemble.time_rule.NAMES
    time_format: str | None = None  # of strptime


@dataclass
class Said:
    """Collects what a column was taken for, as its readers fill it in."""

    file: str
    name: str
    what: str = ""  # "times: Unix milliseconds"
    low: str = ""
    high: str = ""
    missing: int = 0
    notes: list[str] = field(default_factory=list)  # how cells were mended
    warnings: list[str] = field(default_factory=list)  # what looks wrong

    def note(self, text: str) -> None:
        """Adds a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Adds a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class Column:
    """Holds one column and where it stands, so that errors can name it."""

    file: str
    name: str
    values: pa.ChunkedArray
    pieces: tuple[tuple[str, int], ...] = ()  # of several files read as one: each one's name and first row
    rows: Array | None = None  # [n] int64: the file's row of each cell, where some rows were left out
    reading: Reading = Reading()
    is_text: bool = False  # the file holds text, whatever type its cells are kept in
    said: Said = field(default_factory=lambda: Said("", ""), compare=False)

    def error(self, row: int, rule: str, value: Any = None) -> InvalidInput:
        """Makes the error for the row of index `row`, naming its value unless another one is given."""
        shown = self.values[row].as_py() if value is None else value
        shown = repr(str(shown) if self.is_text and isinstance(shown, int) else shown)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        return InvalidInput(f"{self.place(row)}: {shown} {rule}")

    def place(self, row: int) -> str:
        """Names the place of the row of index `row`: file, column, row from 1."""
        row = row if self.rows is None else int(self.rows[row])
        file, first = max(
            (one for one in self.pieces if one[1] <= row), key=itemgetter(1), default=(self.file, 0)
        )
        return f"{file}: column {self.name!r}, row {row - first + 1}"

    def wrong_type(self, wanted: str) -> InvalidInput:
        """Makes the error for a column of a type that cannot hold what is `wanted`."""
        return InvalidInput(f"{self.file}: column {self.name!r} has type {self.values.type}; wanted {wanted}")

    def where(self, keep: Array) -> Column:
        """Gives the cells where `keep` [n] bool is true; errors still name the file's rows."""
        rows = np.flatnonzero(keep) if self.rows is None else self.rows[keep]
        return replace(self, values=self.values.filter(pa.array(keep)), rows=rows)


def first_true(mask: Array) -> int:
    """Finds the index of the first true element, -1 if there is none."""
    index = int(mask.argmax()) if len(mask) else 0
    return index if len(mask) and mask[index] else -1


def to_numpy(values: Any) -> Array:
    """Gives Arrow's values as a NumPy array [n]."""
    return (values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values).to_numpy(
        zero_copy_only=False
    )


def is_textual(kind: pa.DataType) -> bool:
    """Says whether cells of a type are text, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_list(column: Column) -> bool:
    """Says whether each cell is a list."""
    kind = column.values.type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Takes off dictionary encoding (pandas categoricals), makes text's offsets 64 bits wide, and gives a
    column without a type, all missing, that of text."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if is_textual(values.type) or pa.types.is_null(values.type):
        return values.cast(pa.large_string())
    return values


def distinct_of(values: pa.ChunkedArray) -> tuple[pa.Array, Array]:
    """Gives the distinct values [K], none missing, and which of them each cell holds [n] int64, -1 where it
    is missing."""
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    if not len(values):
        return pa.array([], values.type.value_type), np.zeros(0, np.int64)
    encoded = values.unify_dictionaries().combine_chunks()
    index = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return encoded.dictionary, index


def each_text(column: Column, change: Callable[[pa.Array], pa.Array]) -> pa.ChunkedArray:
    """Applies `change` to a text column's distinct texts, and lays the answers out over its rows."""
    texts, index = distinct_of(column.values)
    changed = change(texts.cast(pa.large_string()))
    return pa.chunked_array([changed.take(pa.array(index, mask=index < 0))], changed.type)


def are_missing(texts: pa.Array) -> pa.Array:
    """Says which texts [K] only say that a value is missing: empty, nan, NULL, None, NA, … [K] bool."""
    trimmed = pc.utf8_trim_whitespace(texts)
    in_any_case = pc.is_in(pc.utf8_lower(trimmed), value_set=pa.array(MISSING_WORDS, trimmed.type))
    return pc.or_(in_any_case, pc.is_in(trimmed, value_set=pa.array(MISSING_AS_WRITTEN, trimmed.type)))


def shown(texts: list[Any], most: int = 3) -> str:
    """Lists the first few of some values, as errors and notes name them."""
    return ", ".join(repr(text) for text in texts[:most]) + (", …" if len(texts) > most else "")


def cast(column: Column, values: pa.ChunkedArray, kind: pa.DataType, rule: str) -> pa.ChunkedArray:
    """Casts, or names the first row that cannot be cast: halving finds it in a few casts."""
    try:
        return values.cast(kind, safe=not pa.types.is_floating(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                values.slice(low, middle - low).cast(kind)
                low = middle
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                high = middle
        raise column.error(low, rule) from None

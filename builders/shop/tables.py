"""Reads checked columns of parquet and CSV files; errors name file, column, row (from 1), value and cure."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.id_rule import MAX_ID_BYTES, id_fault

MAX_POSITION = 1_000_000  # a larger number is an id or a time, not a place in a list
CLOCK_SKEW_S = 86_400  # local times may run up to a day ahead of UTC


@dataclass(frozen=True)
class Column:
    """Holds one column and where it stands, so that errors can name it."""

    file: str
    name: str
    values: pa.ChunkedArray
    pieces: tuple[tuple[str, int], ...] = ()  # of several files read as one: each one's name and first row

    def error(self, row: int, rule: str, value: Any = None) -> InvalidInput:
        """Makes the error for the row of index `row`, naming its value unless another one is given."""
        shown = repr(self.values[row].as_py() if value is None else value)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        file, first = max(
            (one for one in self.pieces if one[1] <= row), key=itemgetter(1), default=(self.file, 0)
        )
        return InvalidInput(f"{file}: column {self.name!r}, row {row - first + 1}: {shown} {rule}")

    def wrong_type(self, wanted: str) -> InvalidInput:
        return InvalidInput(f"{self.file}: column {self.name!r} has type {self.values.type}; wanted {wanted}")


def read_table(folder: Path, file: str, columns: list[str]) -> dict[str, Column]:
    """Reads columns of a parquet or CSV file by name; a CSV's cells stay text: 007 keeps its zeros."""
    path = folder / file
    if not path.is_file():
        raise InvalidInput(f"{path} is missing; shop.toml names it as {file!r}")
    try:
        table = _READERS[path.suffix](path, columns)
    except KeyError:
        raise InvalidInput(f"{path}: files end in {' or '.join(_READERS)}, not {path.suffix!r}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return {name: Column(file, name, _plain(table.column(name))) for name in dict.fromkeys(columns)}


def read_tables(folder: Path, files: list[str], columns: list[str]) -> tuple[dict[str, Column], Array]:
    """Reads columns of several files as of one, in this order; gives also which file each row is of [n]
    int64."""
    tables = [read_table(folder, file, columns) for file in files]
    lengths = [len(table[columns[0]].values) for table in tables]
    starts = tuple(zip(files, np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist(), strict=True))
    whole = {}
    for name, first in tables[0].items():
        for table in tables[1:]:
            if table[name].values.type != first.values.type:
                raise table[name].wrong_type(f"{first.values.type}, as in {first.file}")
        chunks = [chunk for table in tables for chunk in table[name].values.chunks]
        values = pa.chunked_array(chunks, first.values.type)
        whole[name] = Column(first.file, name, values, starts if len(files) > 1 else ())
    return whole, np.repeat(np.arange(len(files)), lengths)


def _read_parquet(path: Path, columns: list[str]) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        _require(path, columns, file.schema_arrow.names)
        return file.read(columns=list(dict.fromkeys(columns)))


def _read_csv(path: Path, columns: list[str]) -> pa.Table:
    from pyarrow import csv

    with path.open("rb") as file:
        header = csv.read_csv(pa.BufferReader(file.readline()))
    _require(path, columns, header.column_names)
    convert = csv.ConvertOptions(
        column_types={name: pa.string() for name in columns},
        include_columns=list(dict.fromkeys(columns)),
        strings_can_be_null=True,
        null_values=[""],
    )
    return csv.read_csv(
        path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert
    )


_READERS: dict[str, Callable[[Path, list[str]], pa.Table]] = {".parquet": _read_parquet, ".csv": _read_csv}


def _require(path: Path, columns: list[str], there: list[str]) -> None:
    for name in columns:
        if name not in there:
            raise InvalidInput(
                f"{path} has no column {name!r}; its columns are {', '.join(map(repr, there))}"
            )


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Takes off dictionary encoding (pandas categoricals), and makes text's offsets 64 bits wide."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.large_string()) if pa.types.is_string(values.type) else values


def first_true(mask: Array) -> int:
    """Finds the index of the first true element, -1 if there is none."""
    index = int(mask.argmax()) if len(mask) else 0
    return index if len(mask) and mask[index] else -1


def _numpy(values: Any) -> Array:
    return (values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values).to_numpy(
        zero_copy_only=False
    )


# --- ids ---


def ids_from_column(column: Column) -> tuple[Array, Array]:
    """Gives the distinct ids [K] S in byte order, and the index of each row's id [n] int64."""
    kind = column.values.type
    if not (pa.types.is_integer(kind) or pa.types.is_large_string(kind)):
        raise column.wrong_type("text or integers, for ids")
    missing = first_true(_numpy(column.values.is_null()))
    if missing >= 0:
        raise InvalidInput(f"{column.file}: column {column.name!r}, row {missing + 1}: the id is missing")
    encoded = column.values.dictionary_encode().combine_chunks()
    index = encoded.indices.to_numpy(zero_copy_only=False)
    texts = encoded.dictionary.cast(pa.large_string()).cast(pa.large_binary())
    _check_ids(column, texts, index)
    distinct = np.array(texts.to_pylist(), dtype="S") if len(texts) else np.zeros(0, "S1")
    order = np.argsort(distinct, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[index]


def _check_ids(column: Column, texts: pa.Array, index: Array) -> None:
    """Raises InvalidInput for the first of `texts` [K] that is no id; row i has texts[index[i]]."""
    length = _numpy(pc.binary_length(texts))
    bad = (length == 0) | (length > MAX_ID_BYTES) | (_numpy(pc.find_substring(texts, b"\x00")) >= 0)
    which = first_true(bad)
    if which >= 0:
        raise column.error(first_true(index == which), f"is no id: {id_fault(texts[which].as_py())}")


# --- numbers ---


def numbers_from_column(column: Column) -> Array:
    """Reads numbers [n] float64, NaN where the cell is empty; a NaN or infinity in the file is refused."""
    kind = column.values.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_decimal(kind)
    ):
        raise column.wrong_type("numbers")
    values = _cast(column, _truth_words(column.values), pa.float64(), "is no number")
    numbers = _numpy(values).astype(np.float64)
    bad = first_true(~np.isfinite(numbers) & _numpy(values.is_valid()))
    if bad >= 0:
        raise column.error(bad, "is no finite number; leave the cell empty (null) where a value is missing")
    return numbers


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
    return np.where(np.isnan(numbers), 0.0, numbers).astype(np.int64)


def chances_from_column(column: Column) -> Array:
    """Reads chances [n] float64, above 0 and at most 1; NaN where the cell is empty."""
    chances = numbers_from_column(column)
    wrong = first_true((chances <= 0) | (chances > 1))
    if wrong >= 0:
        raise column.error(
            wrong, "is no chance above 0 and at most 1; leave the cell empty (null) where it is unknown"
        )
    return chances


def _truth_words(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Reads a CSV's true and false as 1 and 0."""
    if pa.types.is_boolean(values.type):
        return values.cast(pa.int8())
    if pa.types.is_large_string(values.type):
        lower = pc.utf8_lower(pc.utf8_trim_whitespace(values))
        return pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", lower))
    return values


def times_from_column(column: Column, now_s: float) -> Array:
    """Reads Unix seconds [n] int64 from numbers, timestamps or ISO texts; refuses missing and future ones."""
    values, kind = column.values, column.values.type
    missing = first_true(_numpy(values.is_null()))
    if missing >= 0:
        raise InvalidInput(f"{column.file}: column {column.name!r}, row {missing + 1}: the time is missing")
    if pa.types.is_large_string(kind) and len(values) and not _is_number(values[0].as_py()):
        values = _cast(column, values, pa.timestamp("s"), "is neither Unix seconds nor an ISO time")
    if pa.types.is_temporal(values.type):
        times = _numpy(values.cast(pa.timestamp("s"), safe=False).cast(pa.int64()))
    elif pa.types.is_integer(values.type):
        times = _numpy(values.cast(pa.int64()))
    else:
        times = np.floor(numbers_from_column(column)).astype(np.int64)
    late = first_true(times > now_s + CLOCK_SKEW_S)
    if late >= 0:
        raise column.error(late, f"is in the future{_date(times[late])}; times are Unix seconds")
    return times


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _date(time_s: int) -> str:
    try:
        return f" ({datetime.datetime.fromtimestamp(int(time_s), datetime.UTC):%Y-%m-%d})"
    except (ValueError, OverflowError, OSError):
        return " (milliseconds?)"


def _cast(column: Column, values: pa.ChunkedArray, kind: pa.DataType, rule: str) -> pa.ChunkedArray:
    """Casts, or names the first row that cannot be cast: halving finds it in a few casts."""
    try:
        return values.cast(kind, safe=not pa.types.is_floating(kind))
    except pa.ArrowInvalid:
        low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                values.slice(low, middle - low).cast(kind)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        raise column.error(low, rule) from None


# --- texts and lists ---


def texts_from_column(column: Column) -> pa.LargeStringArray:
    """Reads texts [n], null where empty; integers become decimal text, booleans true and false."""
    values, kind = column.values, column.values.type
    if pa.types.is_floating(kind):  # pandas writes integers with gaps as floats
        values = _cast(column, values, pa.int64(), "is no category: use text or integers")
    elif not (pa.types.is_large_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise column.wrong_type("text, integers or booleans")
    return values.cast(pa.large_string()).combine_chunks()


def is_list(column: Column) -> bool:
    kind = column.values.type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def lists_from_column(column: Column, separator: str | None) -> tuple[Array, pa.LargeStringArray]:
    """Lays all rows' values in one line: their rows [m] int64 ascending, their texts [m], none empty."""
    if is_list(column):
        values = pa.chunked_array(
            [chunk.cast(pa.large_list(chunk.type.value_type)) for chunk in column.values.chunks],
            pa.large_list(column.values.type.value_type),
        )
        lists = values.combine_chunks()
        rows, flat = _numpy(pc.list_parent_indices(lists)), pc.list_flatten(lists)
        texts = texts_from_column(Column(column.file, column.name, _plain(pa.chunked_array([flat]))))
    else:
        texts = texts_from_column(column)
        rows = np.arange(len(texts))
        if separator is not None:
            lists = pc.split_pattern(texts, pattern=separator)
            rows, texts = (
                _numpy(pc.list_parent_indices(lists)),
                pc.utf8_trim_whitespace(pc.list_flatten(lists)),
            )
    keep = pc.fill_null(pc.not_equal(texts, ""), False)
    return rows[_numpy(keep)].astype(np.int64), texts.filter(keep)


def vectors_from_column(column: Column, dim: int, separator: str | None) -> Array:
    """Reads vectors [n, dim] float64, NaN rows where empty; each must have `dim` finite components."""
    if is_list(column):
        lists = pa.chunked_array(
            [c.cast(pa.large_list(c.type.value_type)) for c in column.values.chunks],
            pa.large_list(column.values.type.value_type),
        ).combine_chunks()
    else:
        lists = pc.split_pattern(texts_from_column(column), pattern=separator or " ")
    length = _numpy(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    wrong = first_true((length != dim) & (length > 0))
    if wrong >= 0:
        raise column.error(wrong, f"has {length[wrong]} components; vector({dim}) wants {dim}")
    flat = numbers_from_column(
        Column(column.file, column.name, _plain(pa.chunked_array([pc.list_flatten(lists)])))
    )
    if np.isnan(flat).any():
        raise column.error(
            int(np.flatnonzero(length)[first_true(np.isnan(flat)) // dim]), "holds an empty component"
        )
    vectors = np.full((len(length), dim), np.nan)
    vectors[length > 0] = flat.reshape(-1, dim)
    return vectors

"""Reads JSON lines as batches: one object a line, the wanted keys its columns."""

from __future__ import annotations

import io
import json as plain_json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import json

from builders.shop.columns.column import Reading
from builders.shop.formats.streams import head, not_utf8, opened
from ensemble.errors import InvalidInput

_BLOCK_BYTES = 8 << 20


def names_of(path: Path, reading: Reading) -> list[str]:
    """Gives the keys of the first lines' objects, in their order."""
    names: dict[str, None] = {}
    for at, line in enumerate(
        head(path).decode(reading.encoding or "utf-8", errors="replace").splitlines()[:200]
    ):
        if line.strip():
            try:
                row = plain_json.loads(line)
            except (ValueError, RecursionError):
                if at and names:
                    break  # cut by the head's end, or named when it is read
                raise _no_object(path, at) from None
            if not isinstance(row, dict):
                raise _no_object(path, at)
            names |= dict.fromkeys(map(str, row))
    return list(names)


def batches(path: Path, columns: list[str], reading: Reading) -> Iterator[pa.RecordBatch]:
    """Gives batches of the wanted columns; a key that a line lacks is null."""
    done = 0
    with opened(path, reading.encoding) as stream:
        held = b""
        while True:
            data = stream.read(_BLOCK_BYTES)
            block, _, held = (held + data).rpartition(b"\n") if data else (held, b"", b"")
            if block.strip():
                for batch in _block(path, block.removeprefix(b"\xef\xbb\xbf"), columns, done):
                    done += batch.num_rows
                    yield batch
            if not data:
                return


def _block(path: Path, block: bytes, columns: list[str], done: int) -> list[pa.RecordBatch]:
    """Reads whole lines, of which the first is the file's row `done`."""
    options = json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        table = json.read_json(io.BytesIO(block), options)
        times = [
            one for one in columns if one in table.column_names and _is_time(table.schema.field(one).type)
        ]
        if times:  # text that Arrow took for a time stays text: it may be an id
            schema = pa.schema([(name, pa.string()) for name in times])
            parse = json.ParseOptions(explicit_schema=schema)
            table = json.read_json(io.BytesIO(block), options, parse)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return [_row_by_row(path, block, columns, done)]
    arrays = [
        table.column(name) if name in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])
        for name in columns
    ]
    return pa.table(arrays, names=columns).to_batches()


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind)


def _row_by_row(path: Path, block: bytes, columns: list[str], done: int) -> pa.RecordBatch:
    """Reads lines whose other keys Arrow does not take, or names the first that is no object."""
    rows: list[dict[str, Any]] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        try:
            row = plain_json.loads(line)
        except UnicodeDecodeError:
            raise not_utf8(path) or _no_object(path, done + len(rows)) from None
        except (ValueError, RecursionError):
            raise _no_object(path, done + len(rows)) from None
        if not isinstance(row, dict):
            raise _no_object(path, done + len(rows))
        rows.append(row)
    arrays = []
    for name in columns:
        cells = [row.get(name) for row in rows]
        try:
            arrays.append(pa.array(cells))
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            raise _mixed(path, name, cells, done) from None
    return pa.record_batch(arrays, names=columns)


def _mixed(path: Path, name: str, cells: list[Any], done: int) -> InvalidInput:
    """Makes the error for a key whose values are of several kinds."""
    kinds = [type(cell) for cell in cells]
    known = [kind for kind in kinds if kind is not type(None)]
    first = next((at for at, kind in enumerate(kinds) if known and kind not in (known[0], type(None))), 0)
    value = repr(cells[first])
    return InvalidInput(
        f"{path}: column {name!r}, row {done + first + 1}: {value[:60]} is of another kind than the "
        f"values before "
        "it; write all as text, or all as numbers"
    )


def _no_object(path: Path, row: int) -> InvalidInput:
    return InvalidInput(f'{path}: line {row + 1} is no JSON object; each line holds one: {{"user_id": …}}')

"""Reads the plain files of known data formats; InvalidInput names the file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from builders.shop.columns.column import Column
from builders.shop.columns.numbers import numbers_from_column
from ensemble.errors import InvalidInput


def delimited(data: bytes, path: Path, *, names: list[str] | None = None, delimiter: str = "\t") -> pa.Table:
    """Reads a delimited file's cells, all as text; quotes count only between commas."""
    from pyarrow import csv

    if not data.strip():
        raise InvalidInput(f"{path} is empty")
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False)
    first = data.split(b"\n", 1)[0].decode(errors="replace").strip().lstrip("\ufeff").split(delimiter)
    convert = csv.ConvertOptions(
        column_types={c: pa.string() for c in names or first}, strings_can_be_null=True, null_values=[""]
    )
    try:
        return csv.read_csv(pa.BufferReader(data), csv.ReadOptions(column_names=names), parse, convert)
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def numbers_of(path: Path, name: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Reads cells as numbers; InvalidInput names the first that is none."""
    return pa.chunked_array(
        [
            pa.array(
                numbers_from_column(Column(path.name, name, cells.cast(pa.large_string()))), from_pandas=True
            )
        ]
    )


def text_of(path: Path, encoding: str) -> str:
    """Reads a whole file in this encoding."""
    if not path.is_file():
        raise InvalidInput(f"{path} is missing")
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not {encoding} (byte {error.start})") from None


def only_file(folder: Path, pattern: str) -> Path:
    """Finds the one file in a folder that matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise InvalidInput(f"{folder}: {len(found)} files match {pattern}; give the file itself or --name")
    return found[0]

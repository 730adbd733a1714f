"""Reads delimited text, CSV and its kin, as batches whose cells are text; finds the separator by the
header."""

from __future__ import annotations

import csv as plain_csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import Reading
from builders.shop.formats.streams import encoding_of, head, not_utf8, opened
from ensemble.errors import InvalidInput

BLOCK_BYTES = 8 << 20
_USUAL = (",", "\t", ";", "|")
_SEPARATOR_LINE = re.compile(r'^"?sep=(.)"?$')
_STAND_IN = "\x1f"  # of a separator beyond ASCII: the sign that ASCII has for it
_NAMES = {"\t": "tabs", " ": "blanks"}


def header_of(path: Path, columns: list[str], reading: Reading) -> tuple[list[str], str]:
    """Gives a file's column names and its separator: the one named, or the one by which the header has the
    wanted `columns`, else most names."""
    line = first_line(path, reading.encoding)
    separator = reading.separator or _told_separator(path, reading.encoding)
    if separator is not None:
        return _split(line, separator), separator
    usual = ["\t", *_USUAL] if ".tsv" in map(str.lower, path.suffixes) else list(_USUAL)
    odd = [sign for sign in dict.fromkeys(line) if not (sign.isalnum() or sign in "_\"'.-()[]\r\n")]
    candidates = list(dict.fromkeys([*usual, *odd]))
    splits = {sign: _split(line, sign) for sign in candidates}
    fit = [sign for sign in candidates if set(columns) <= set(splits[sign])]
    best = max(fit or usual, key=lambda sign: len(splits[sign]))
    return splits[best], best


def first_line(path: Path, encoding: str | None) -> str:
    """Gives the line of column names; InvalidInput for a file without one."""
    name = encoding_of(path, encoding)
    text = head(path).decode(name, errors="replace").removeprefix("\ufeff")
    lines = text.splitlines()[:2] if text.strip() else [""]
    line = lines[-1] if _SEPARATOR_LINE.match(lines[0]) else lines[0]
    if not line.strip():
        raise InvalidInput(f"{path} has no first line; it must name the columns")
    if "\0" in line:
        raise InvalidInput(f"{path} is no text: its first line holds NUL bytes")
    return line


def _told_separator(path: Path, encoding: str | None) -> str | None:
    """Gives the separator that a file's first line says, as spreadsheets write it: sep=; before the names."""
    text = head(path, 16).decode(encoding_of(path, encoding), errors="replace").removeprefix("\ufeff")
    told = _SEPARATOR_LINE.match(text.splitlines()[0]) if text.strip() else None
    return told[1] if told else None


def _split(line: str, sign: str) -> list[str]:
    return [name.strip() for name in next(plain_csv.reader(io.StringIO(line), delimiter=sign))]


def separator_name(sign: str) -> str:
    """Names a separator as notes do."""
    return _NAMES.get(sign, repr(sign))


def batches(path: Path, columns: list[str], reading: Reading) -> Iterator[pa.RecordBatch]:
    """Gives batches of the wanted columns, their cells as text; 007 keeps its zeros, and an empty cell is
    null."""
    from pyarrow import csv

    names, sign = header_of(path, columns, reading)
    above = 1 if _told_separator(path, reading.encoding) is None else 2  # lines before the first row
    quote = '"' if sign != '"' else False
    parse = csv.ParseOptions(
        delimiter=sign if sign.isascii() else _STAND_IN, quote_char=quote, newlines_in_values=True
    )
    places = [f"c{at}" for at in range(len(names))]
    wanted = [places[names.index(name)] for name in columns]
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()),
        include_columns=wanted,
        strings_can_be_null=True,
        null_values=[""],
    )
    read = csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=places, skip_rows=above)
    done = 0
    try:
        with (
            opened(path, reading.encoding) as stream,
            csv.open_csv(
                _in_ascii(stream, sign), read_options=read, parse_options=parse, convert_options=convert
            ) as reader,
        ):
            for batch in reader:
                done += batch.num_rows
                yield _as_written(batch.rename_columns(columns), sign)
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error) and not done:
            return
        raise _fault(path, sign, error) from None


class _InAscii(io.RawIOBase):
    """Reads a stream of UTF-8 in which a stand-in takes the place of a sign that Arrow takes for no
    separator."""

    def __init__(self, stream: Any, sign: str) -> None:
        self._stream, self._sign, self._held = stream, sign.encode(), b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while True:
            new = self._stream.read(size)
            data = self._held + new
            cuts = range(1, len(self._sign)) if new else ()
            cut = next((n for n in cuts if data.endswith(self._sign[:n])), 0)  # half a sign at the end
            self._held = data[len(data) - cut :]
            whole: bytes = data[: len(data) - cut].replace(self._sign, _STAND_IN.encode())
            if whole or not new:
                return whole


def _in_ascii(stream: Any, sign: str) -> Any:
    return stream if sign.isascii() else _InAscii(stream, sign)


def _as_written(batch: pa.RecordBatch, sign: str) -> pa.RecordBatch:
    """Puts the sign back where it stood inside a cell, in quotes."""
    if sign.isascii():
        return batch
    cells = [pc.replace_substring(one, _STAND_IN, sign) for one in batch.columns]
    return pa.record_batch(cells, names=batch.schema.names)


_ROW = re.compile(r"CSV parse error: (?:Row #(\d+): )?Expected (\d+) columns, got (\d+): ?(.*)", re.DOTALL)


def _fault(path: Path, sign: str, error: Exception) -> InvalidInput:
    """Says in our words what stopped Arrow's reader."""
    if found := _ROW.match(str(error)):
        number, wanted, came, text = found.groups()
        place = f"row {int(number) - 1}" if number else "a row"
        text = text if len(text) <= 60 else text[:57] + "…"
        return InvalidInput(
            f"{path}: {place} has {came} cells, its header {wanted} (separated by {separator_name(sign)}): "
            f"{text!r}; quote cells that hold the separator, or name another one: "
            'separator = "…"'
        )
    if "UTF8" in str(error) or "utf-8" in str(error).lower():
        return not_utf8(path) or InvalidInput(f"{path} cannot be read: {_first(error)}")
    told = separator_name(sign)
    return InvalidInput(f"{path} cannot be read: {_first(error)}; is it whole, and separated by {told}?")


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]

"""Reads columns of a shop's tables by name: one file or a folder of them, in any of the known formats.

Only the wanted columns are kept, batch by batch, in little room: texts once each, whole numbers and times
in 8 bytes. So a file may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import Column, Reading, Said, is_textual, plain
from builders.shop.columns.times import parsed_times
from builders.shop.formats import arrow, delimited, json_lines
from builders.shop.formats.streams import PACKED
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

_TEXT = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_BINARY = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
ENDINGS = (*_TEXT, *_BINARY)
_WHOLE = r"^(?:0|-?[1-9][0-9]{0,17})$"  # text that a whole number is written as in one way only
_TOGETHER = 32  # batches that are put together as they come
_NOTHING = "__HIVE_DEFAULT_PARTITION__"  # what Hive writes for a missing value


def read_table(
    folder: Path,
    file: str,
    columns: list[str],
    reading: Reading | None = None,
    times: tuple[str, ...] = (),
) -> dict[str, Column]:
    """Reads columns of a file, or of the files of a folder, by name; `times` names those that hold times."""
    reading = reading or Reading()
    columns, path = list(dict.fromkeys(columns)), folder / file
    parts = files_of(path, file)
    chunks: dict[str, list[pa.Array]] = {name: [] for name in columns}
    pieces, done, is_text = [], 0, False
    for part in parts:
        pieces.append((str(Path(file) / part.relative_to(path)) if part != path else file, done))
        is_text = is_text or form_of(part) == "csv"
        with _named_errors(part):
            for batch in _batches(part, path, columns, reading):
                done += batch.num_rows
                for name, kept in chunks.items():
                    kept.append(_compact(batch.column(name), name in times))
                    if len(kept) % _TOGETHER == 0:
                        kept[-_TOGETHER:] = _joined(kept[-_TOGETHER:], file, name)
    said = {name: Said(file, name) for name in columns}
    if len(parts) == 1 and is_text:
        _say_separator(parts[0], columns, reading, said)
    with _named_errors(path):
        whole = {name: pa.chunked_array(_alike(kept, file, name)) for name, kept in chunks.items()}
    held = tuple(pieces) if len(pieces) > 1 else ()
    return {
        name: Column(file, name, values, held, None, reading, is_text, said[name])
        for name, values in whole.items()
    }


def read_tables(
    folder: Path,
    files: list[str],
    columns: list[str],
    reading: Reading | None = None,
    times: tuple[str, ...] = (),
) -> tuple[dict[str, Column], Array]:
    """Reads columns of several files as of one, in this order; gives also which file each row is of [n]
    int64."""
    tables = [read_table(folder, file, columns, reading, times) for file in files]
    if len(tables) == 1:
        return tables[0], np.zeros(len(next(iter(tables[0].values())).values), np.int64)
    lengths = [len(table[columns[0]].values) for table in tables]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
    whole = {}
    for name, first in tables[0].items():
        chunks = [chunk for table in tables for chunk in table[name].values.chunks]
        pieces = [
            (piece, start + row)
            for table, start, file in zip(tables, starts, files, strict=True)
            for piece, row in table[name].pieces or ((file, 0),)
        ]
        with _named_errors(folder / files[-1]):
            values = pa.chunked_array(_alike(chunks, files[-1], name))
        whole[name] = replace(first, values=values, pieces=tuple(pieces))
    return whole, np.repeat(np.arange(len(files)), lengths)


def first_columns(folder: Path, file: str, encoding: str | None = None) -> dict[str, Column]:
    """Reads all columns of the first rows of a file, or of a folder's first file."""
    path, reading = folder / file, Reading(encoding=encoding)
    part = files_of(path, file)[0]
    in_path = [name.split("=", 1)[0] for name in part.relative_to(path).parent.parts if "=" in name]
    columns = list(dict.fromkeys([*names_of(part, [], reading), *in_path]))
    with _named_errors(part):
        batch = next(_batches(part, path, columns, reading), None)
    if batch is None:
        raise InvalidInput(f"{part} has no rows")
    cells = {name: pa.chunked_array([_compact(batch.column(name), False)]) for name in columns}
    return {
        name: Column(
            file, name, plain(values) if pa.types.is_null(values.type) else values, said=Said(file, name)
        )
        for name, values in cells.items()
    }


def files_of(path: Path, file: str) -> list[Path]:
    """Gives the file itself, or all files of a folder, sorted, but for those hidden or begun with _;
    InvalidInput where there is none, or where they are of several formats."""
    if path.is_file():
        form_of(path)
        return [path]
    if not path.is_dir():
        raise InvalidInput(f"{path} is missing; shop.toml names it as {file!r}")
    found = sorted(table_files(path))
    if not found:
        raise InvalidInput(f"{path} is a folder without a file of a table ({', '.join(ENDINGS)})")
    forms = {form_of(part) for part in found}
    if len(forms) > 1:
        raise InvalidInput(f"{path} holds files of several formats: {', '.join(sorted(forms))}; keep one")
    return found


def table_files(path: Path) -> Iterator[Path]:
    """Gives the files of tables below a folder."""
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in names:
            if name[0] not in "._" and _ending(Path(name)) in ENDINGS:
                yield Path(parent, name)


def _ending(path: Path) -> str:
    """Gives the ending that names the format, in small letters: .csv of LOG.CSV.gz."""
    return (Path(path.stem).suffix if path.suffix.lower() in PACKED else path.suffix).lower()


def is_text_file(path: Path) -> bool:
    """Says whether a table's file is text: CSV and its kin, or JSON lines."""
    return form_of(path) in _TEXT.values()


def form_of(path: Path) -> str:
    """Names a file's format by its ending: csv, jsonl, parquet or arrow."""
    ending = _ending(path)
    if path.suffix.lower() in PACKED and ending in _BINARY:
        raise InvalidInput(f"{path}: {ending} files are compressed inside; unpack this one")
    try:
        return {**_TEXT, **_BINARY}[ending]
    except KeyError:
        raise InvalidInput(
            f"{path}: files end in {', '.join(ENDINGS)} (texts also in {', '.join(PACKED)}), not "
            f"{path.suffix!r}"
        ) from None


def names_of(path: Path, columns: list[str], reading: Reading) -> list[str]:
    """Gives the names of a file's columns."""
    form = form_of(path)
    with _named_errors(path):
        if form == "csv":
            return delimited.header_of(path, columns, reading)[0]
        if form == "jsonl":
            return json_lines.names_of(path, reading)
        return arrow.parquet_names(path) if form == "parquet" else arrow.arrow_names(path)


def _batches(part: Path, root: Path, columns: list[str], reading: Reading) -> Iterator[pa.RecordBatch]:
    """Gives batches of one file, with the columns that its folders' names hold (day=2026-01-01)."""
    in_path = dict(name.split("=", 1) for name in part.relative_to(root).parent.parts if "=" in name)
    there = names_of(part, [name for name in columns if name not in in_path], reading)
    for name in columns:
        if name not in there and name not in in_path:
            raise InvalidInput(
                f"{part} has no column {name!r}; its columns are {', '.join(map(repr, [*there, *in_path]))}"
            )
        if there.count(name) > 1:
            raise InvalidInput(f"{part} has {there.count(name)} columns {name!r}; give each its own name")
    inside = [name for name in columns if name in there] or there[:1]
    form = form_of(part)
    if form == "csv":
        batches = delimited.batches(part, inside, reading)
    elif form == "jsonl":
        batches = json_lines.batches(part, inside, reading)
    else:
        read = arrow.parquet_batches if form == "parquet" else arrow.arrow_batches
        batches = read(part, inside)
    for batch in batches:
        if form in _BINARY.values():
            batch.validate(full=True)  # a file that is damaged may hold texts that are none
        arrays = [
            batch.column(name) if name in inside else _constant(in_path[name], batch.num_rows)
            for name in columns
        ]
        yield pa.record_batch(arrays, names=columns)


def _constant(text: str, rows: int) -> pa.Array:
    """Gives what a folder's name says, for each of its rows."""
    text = unquote(text)
    return pa.nulls(rows, pa.string()) if text == _NOTHING else pa.repeat(text, rows)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Makes one line of what Arrow and the system say of a file that cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError, EOFError) as error:
        raise InvalidInput(
            f"{path} cannot be read: {str(error).splitlines()[0]}; is the file whole?"
        ) from None


def _say_separator(path: Path, columns: list[str], reading: Reading, said: dict[str, Said]) -> None:
    sign = delimited.header_of(path, columns, reading)[1]
    if sign != "," and reading.separator is None:
        said[columns[0]].note(f"columns separated by {delimited.separator_name(sign)}")


# --- keeping columns small ---


def _compact(values: pa.Array, is_time: bool) -> pa.Array:
    """Keeps a batch's cells in little room, so that nothing is lost: whole numbers that a file has as text in
    8 bytes, other texts once each."""
    values = _of_a_plain_type(values)
    if pa.types.is_dictionary(values.type) and not is_textual(values.type):
        values = values.cast(values.type.value_type)
    if not is_textual(values.type):
        return values
    texts = values.dictionary if pa.types.is_dictionary(values.type) else values
    texts = texts.cast(pa.large_string())
    if not pa.types.is_dictionary(values.type):
        values = texts
    whole = pc.all(pc.match_substring_regex(texts, _WHOLE), min_count=0).as_py()
    if whole and texts.null_count < len(texts):
        return _laid_out(values, texts.cast(pa.int64()))
    if is_time:
        with contextlib.suppress(pa.ArrowInvalid):
            return _laid_out(values, parsed_times(texts))
    if texts.null_count == len(texts) and not pa.types.is_dictionary(values.type):
        return pa.nulls(len(values))
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    return encoded.cast(pa.dictionary(pa.int32(), pa.large_string()))


def _of_a_plain_type(values: pa.Array) -> pa.Array:
    """Gives what an extension type stores, UUIDs as their usual text; decimals of 32 and 64 bits in 128,
    floats of 16 bits in 32: Arrow does little with either."""
    kind = values.type
    if isinstance(kind, pa.UuidType):
        return _uuid_texts(values.storage)
    if isinstance(kind, pa.BaseExtensionType):
        return values.storage
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return values.cast(pa.decimal128(kind.precision, kind.scale))
    return values.cast(pa.float32()) if pa.types.is_float16(kind) else values


def _uuid_texts(stored: pa.Array) -> pa.Array:
    """Writes UUIDs [n] of 16 bytes as texts of 36 letters, null where one is."""
    filled = stored.fill_null(bytes(16)) if stored.null_count else stored
    octets = np.frombuffer(filled.buffers()[1], np.uint8)[filled.offset * 16 :][: len(filled) * 16]
    nibbles = np.stack([octets >> 4, octets & 15], axis=1).reshape(-1, 32)
    letters = np.insert(
        np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles], [8, 12, 16, 20], ord("-"), axis=1
    )
    offsets = np.arange(0, 36 * len(filled) + 1, 36, dtype=np.int64)
    texts = pa.LargeStringArray.from_buffers(
        len(filled), pa.py_buffer(offsets), pa.py_buffer(letters.tobytes())
    )
    return pc.if_else(stored.is_valid(), texts, None) if stored.null_count else texts


def _laid_out(values: pa.Array, changed: pa.Array) -> pa.Array:
    return changed.take(values.indices) if pa.types.is_dictionary(values.type) else changed


def _joined(chunks: list[pa.Array], file: str, name: str) -> list[pa.Array]:
    """Puts batches together that are of one type, each distinct text once."""
    if len({chunk.type for chunk in chunks}) > 1:
        chunks = _alike(chunks, file, name)
    whole = pa.chunked_array(chunks).unify_dictionaries().combine_chunks()
    return whole.chunks if isinstance(whole, pa.ChunkedArray) else [whole]


def _alike(chunks: list[pa.Array], file: str, name: str) -> list[pa.Array]:
    """Gives all batches of a column one type: text where some are text; InvalidInput where none holds all."""
    kinds = {chunk.type for chunk in chunks if not pa.types.is_null(chunk.type)}
    if not kinds:
        return [chunk.cast(pa.large_string()) for chunk in chunks] or [pa.array([], pa.large_string())]
    if len(kinds) == 1:
        kind = kinds.pop()
    elif all(pa.types.is_integer(one) for one in kinds):
        kind = pa.int64()
    elif all(pa.types.is_integer(one) or pa.types.is_floating(one) for one in kinds):
        kind = pa.float64()
    elif any(map(is_textual, kinds)) and all(
        is_textual(one) or pa.types.is_integer(one) or pa.types.is_timestamp(one) for one in kinds
    ):
        kind = pa.dictionary(pa.int32(), pa.large_string())
    elif all(map(_is_list, kinds)):
        nested = {one.value_type for one in kinds if not pa.types.is_null(one.value_type)}
        kind = pa.large_list(nested.pop() if len(nested) == 1 else pa.large_string())
    else:
        told = " and ".join(sorted(map(str, kinds)))
        raise InvalidInput(f"{file}: column {name!r} is of several types, {told}; write it as one of them")
    return [_as_kind(chunk, kind) for chunk in chunks]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _as_kind(chunk: pa.Array, kind: pa.DataType) -> pa.Array:
    if chunk.type == kind:
        return chunk
    if pa.types.is_dictionary(kind) and not pa.types.is_dictionary(chunk.type):
        return chunk.cast(pa.large_string()).dictionary_encode().cast(kind)
    return chunk.cast(kind)

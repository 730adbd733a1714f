"""Reads parquet and Arrow files as batches of the wanted columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS = 1 << 17


def parquet_names(path: Path) -> list[str]:
    """Gives the names of a parquet file's columns."""
    with pq.ParquetFile(path, memory_map=True) as file:
        return list(file.schema_arrow.names)


def parquet_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Gives batches of a parquet file, texts dictionary-encoded as they are in it."""
    with pq.ParquetFile(path, memory_map=True) as file:
        texts = [
            field.name
            for field in file.schema_arrow
            if field.name in columns
            and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
        ]
    with pq.ParquetFile(path, memory_map=True, read_dictionary=texts) as file:
        for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
            yield batch.select(columns)


def arrow_names(path: Path) -> list[str]:
    """Gives the names of an Arrow file's columns."""
    with _reader(path) as reader:
        return list(reader.schema.names)


def arrow_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Gives batches of an Arrow file (Feather) or stream."""
    with _reader(path) as reader:
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for at in range(reader.num_record_batches):
                yield reader.get_batch(at).select(columns)
        else:
            for batch in reader:
                yield batch.select(columns)


def _reader(path: Path) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path)))

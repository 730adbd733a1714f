"""Keeps the log of changes: a header, then fixed-width records; whoever reads knows the offset of every one.

A record holds its sequence number, what happened, the item's row and id, its packed row
(snapshot.item_dtype), its raw numbers and a crc32 of all that. Writers append whole groups and fsync once a
group. A tail that was torn by a crash is cut off and said; a damaged record with good ones behind it is never
skipped: the file is refused with its name, the offset and the way back.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ensemble import contract
from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.id_rule import MAX_ID_BYTES
from ensemble.release.files import sync_folder
from ensemble.release.snapshot import item_dtype
from ensemble.schema import Schema, number_names

ADD, UPDATE, DELETE = 1, 2, 3
_MAGIC = b"peregrine live 1"
HEADER = np.dtype(
    [
        ("magic", "S16"),
        ("contract", "S16"),
        ("record_bytes", "<u4"),
        ("generation", "<u4"),
        ("after", "<u8"),
        ("crc", "<u4"),
    ]
)
HEADER_BYTES = 64
_PIECE = 4096  # records read and checked at once


def record_dtype(schema: Schema) -> np.dtype:
    """Gives the dtype of one change."""
    return np.dtype(
        [
            ("sequence", "<u8"),
            ("row", "<i8"),
            ("kind", "u1"),
            ("id", f"S{MAX_ID_BYTES}"),
            ("item", item_dtype(schema)),
            ("numbers", "<f4", (max(1, len(number_names(schema))),)),
            ("crc", "<u4"),
        ]
    )


def sealed(records: Array) -> Array:
    """Fills in the records' checksums and gives the records back."""
    records["crc"] = _checksums(records)
    return records


def _good(records: Array) -> Array:
    """Says whose checksum fits: [n] bool."""
    return _checksums(records) == records["crc"]


def _checksums(records: Array) -> Array:
    """Gives the crc32 of each record's bytes but for its last four: [n] uint32."""
    data, size = records.tobytes(), records.dtype.itemsize
    return np.array(
        [zlib.crc32(data[start : start + size - 4]) for start in range(0, len(data), size)], np.uint32
    )


def create_log(path: Path, schema: Schema, generation: int, after: int) -> None:
    """Creates an empty log whose first record will be `after` + 1; it is durable before it has its name."""
    header = np.zeros(1, HEADER)
    header["magic"], header["contract"] = _MAGIC, contract.fingerprint(schema)
    header["record_bytes"] = record_dtype(schema).itemsize
    header["generation"], header["after"] = generation, after
    header["crc"] = zlib.crc32(header.tobytes()[:-4])
    staged = path.with_name(f".{path.name}.new")
    with staged.open("wb") as file:
        file.write(header.tobytes().ljust(HEADER_BYTES, b"\0"))
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)
    sync_folder(path.parent)


class LogReader:
    """Reads a log from its start on, as far as it is whole."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path, self.dtype = path, record_dtype(schema)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReleaseError(f"cannot open {path}: {error.strerror}", _way_back(path)) from error
        # Views of a generation that was merged away are let go one by one
        weakref.finalize(self, os.close, self._descriptor)
        self.offset = HEADER_BYTES
        self.sequence = self._check_header(contract.fingerprint(schema))

    def _check_header(self, fingerprint: str) -> int:
        """Gives the number before the first record's; ReleaseError if the log is none of this release."""
        raw = os.pread(self._descriptor, HEADER_BYTES, 0)
        header = np.frombuffer(raw[: HEADER.itemsize].ljust(HEADER.itemsize, b"\0"), HEADER)[0]
        if header["magic"] != _MAGIC or zlib.crc32(raw[: HEADER.itemsize - 4]) != header["crc"]:
            raise ReleaseError(
                f"{self.path} is no log of live items, or its header is damaged at offset 0",
                _way_back(self.path),
            )
        if header["contract"].decode() != fingerprint or header["record_bytes"] != self.dtype.itemsize:
            raise ReleaseError(
                f"{self.path} belongs to a release with another contract or schema", _way_back(self.path)
            )
        return int(header["after"])

    def has_more(self) -> bool:
        """Says whether the file has grown by a whole record since the last read. One system call."""
        return os.fstat(self._descriptor).st_size >= self.offset + self.dtype.itemsize

    def read(self, limit: int = _PIECE) -> Array:
        """Reads the next records [n], n <= limit; none when there are no whole ones.

        Raises ReleaseError where the middle is damaged.
        """
        raw = os.pread(self._descriptor, limit * self.dtype.itemsize, self.offset)
        records = np.frombuffer(raw[: len(raw) - len(raw) % self.dtype.itemsize], self.dtype)
        good = _good(records)
        expected = self.sequence + 1 + np.arange(len(records), dtype=np.uint64)
        good &= records["sequence"] == expected
        count = len(records) if good.all() else int(np.argmin(good))
        if count < len(records) and (good[count + 1 :].any() or self._follows_good(count)):
            offset = self.offset + count * self.dtype.itemsize
            raise ReleaseError(
                f"{self.path} is damaged at offset {offset}, with whole records behind it",
                _way_back(self.path, offset),
            )
        self.offset += count * self.dtype.itemsize
        self.sequence += count
        return records[:count]

    def _follows_good(self, count: int) -> bool:
        """Says whether any record after the damaged one, beyond what was read, is whole."""
        place = self.offset + (count + 1) * self.dtype.itemsize
        while raw := os.pread(self._descriptor, _PIECE * self.dtype.itemsize, place):
            records = np.frombuffer(raw[: len(raw) - len(raw) % self.dtype.itemsize], self.dtype)
            if _good(records).any():
                return True
            place += len(raw)
        return False


class LogWriter:
    """Appends to a log; the caller holds the writer's lock."""

    def __init__(self, path: Path, schema: Schema, reader: LogReader, note: Callable[[str], None]) -> None:
        """Opens the log for writing, and cuts off what a crash has torn: all that `reader` has not read."""
        self.path, self.sequence = path, reader.sequence
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        torn = os.fstat(self._descriptor).st_size - reader.offset
        if torn:
            os.ftruncate(self._descriptor, reader.offset)
            os.fsync(self._descriptor)
            note(
                f"{path}: the last {torn} bytes were torn by a crash and are cut off; whole up to sequence "
                f"{reader.sequence}"
            )

    def append(self, records: Array) -> int:
        """Writes a group [n], sequence numbers filled in, and makes it durable; gives the last sequence
        number."""
        records["sequence"] = self.sequence + 1 + np.arange(len(records), dtype=np.uint64)
        data, start = memoryview(sealed(records).tobytes()), os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            # A full disk: nothing of the group may stay, or later groups would lie behind a torn one.
            os.ftruncate(self._descriptor, start)
            raise ReleaseError(f"cannot write {self.path}: {error.strerror}; nothing was changed") from error
        self.sequence += len(records)
        return self.sequence


def _way_back(path: Path, offset: int = 0) -> str:
    """Says what to do about a damaged log."""
    keep = (
        f"cut it there (`truncate -s {offset} {path}`: changes from there on are lost), or " if offset else ""
    )
    return (
        f"{keep}put a copy of it back, or move {path.parent} away: the release then serves without live items"
    )

"""Keeps an overlay's log: what the catalogue's log is for one release, as its instances read it.

A header, then fixed-width records. A record holds its sequence number in the catalogue's log, what happened,
the item's row and id, its packed row (snapshot.item_dtype), its raw numbers and a crc32 of all that. Nothing
here has to be durable: the writer makes it again from the catalogue's log where it is torn or damaged. But a
reader never skips a damaged record with good ones behind it: it stays where it is, and says why.
"""

from __future__ import annotations

import os
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble import contract
from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.id_rule import MAX_ID_BYTES
from ensemble.release.snapshot import item_dtype
from ensemble.schema import Schema, number_names

CHANGE, DELETE = 1, 2
_MAGIC, _FIRST_MAGIC = b"peregrine live 2", b"peregrine live 1"
HEADER = np.dtype(
    [
        ("magic", "S16"),
        ("contract", "S16"),
        ("record_bytes", "<u4"),
        ("generation", "<u4"),
        ("after", "<u8"),
        ("catalogue", "S16"),
        ("watermark", "<u8"),
        ("values", "<u4"),
        ("crc", "<u4"),
    ]
)
HEADER_BYTES, _FIRST_HEADER_BYTES = 96, 64
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


@dataclass(frozen=True)
class Origin:
    """Says what an overlay was made from: the catalogue's log, and how much of it the build had read."""

    catalogue: str
    watermark: int
    values: int = 0  # number of the file of new values (new_values.py) that its rows' codes are from


class OldLog(ReleaseError):
    """Says that a log was written before there was one log for all releases."""


def refuse_old_log(path: Path) -> None:
    """Raises OldLog for a log that has changes of before there was one log for all releases."""
    with path.open("rb") as file:
        if file.read(HEADER_BYTES).startswith(_FIRST_MAGIC) and path.stat().st_size > _FIRST_HEADER_BYTES:
            raise OldLog(
                f"{path} has items that an earlier Peregrine changed, encoded for this release alone",
                f"move {path.parent} away, and send those changes again",
            )


def create_log(path: Path, schema: Schema, generation: int, after: int, origin: Origin) -> None:
    """Creates an empty log whose records come after sequence `after`, whole before it has its name."""
    header = np.zeros(1, HEADER)
    header["magic"], header["contract"] = _MAGIC, contract.fingerprint(schema)
    header["record_bytes"] = record_dtype(schema).itemsize
    header["generation"], header["after"] = generation, after
    header["catalogue"], header["watermark"] = origin.catalogue, origin.watermark
    header["values"] = origin.values
    header["crc"] = zlib.crc32(header.tobytes()[:-4])
    staged = path.with_name(f".{path.name}.new")
    staged.write_bytes(header.tobytes().ljust(HEADER_BYTES, b"\0"))
    staged.rename(path)


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
        header = self._checked_header(contract.fingerprint(schema))
        self.sequence = int(header["after"])
        self.origin = Origin(header["catalogue"].decode(), int(header["watermark"]), int(header["values"]))

    def _checked_header(self, fingerprint: str) -> Any:
        """Gives the log's header; ReleaseError if the log is none of this release."""
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
        return header

    def has_more(self) -> bool:
        """Says whether the file has grown by a whole record since the last read. One system call."""
        return os.fstat(self._descriptor).st_size >= self.offset + self.dtype.itemsize

    def read(self, limit: int = _PIECE) -> Array:
        """Reads the next records [n], n <= limit; none when there are no whole ones.

        Raises ReleaseError where the middle is damaged.
        """
        raw = os.pread(self._descriptor, limit * self.dtype.itemsize, self.offset)
        records = np.frombuffer(raw[: len(raw) - len(raw) % self.dtype.itemsize], self.dtype)
        sequences = np.concatenate([[self.sequence], records["sequence"].astype(np.int64)])
        good = _good(records) & (np.diff(sequences) > 0)
        count = len(records) if good.all() else int(np.argmin(good))
        if count < len(records) and (good[count + 1 :].any() or self._follows_good(count)):
            offset = self.offset + count * self.dtype.itemsize
            raise ReleaseError(
                f"{self.path} is damaged at offset {offset}, with whole records behind it",
                _way_back(self.path),
            )
        self.offset += count * self.dtype.itemsize
        self.sequence = int(sequences[count])
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
    """Appends to a log; the caller holds the catalogue's lock."""

    def __init__(self, path: Path, reader: LogReader) -> None:
        """Opens the log for writing, and cuts off what a crash has torn: all that `reader` has not read."""
        self.path, self.sequence = path, reader.sequence
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size > reader.offset:
            os.ftruncate(self._descriptor, reader.offset)

    def append(self, records: Array) -> None:
        """Writes a group [n] of records, all or none; their sequence numbers go on from those before."""
        if not len(records):
            return
        data, start = memoryview(sealed(records).tobytes()), os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            # A full disk: nothing of the group may stay, or later groups would lie behind a torn one.
            os.ftruncate(self._descriptor, start)
            raise ReleaseError(f"cannot write {self.path}: {error.strerror}") from error
        self.sequence = int(records["sequence"][-1])


def _way_back(path: Path) -> str:
    """Says what to do about a damaged log."""
    return f"start the writer, `peregrine serve` or `peregrine items serve`: it makes {path.parent} again"

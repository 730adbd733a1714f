"""Reads the catalogue's log: every change to items as the shop said it, for all releases of a repository.

    <checksum> {"sequence": 7, "born": 3, "kind": "upsert", "item_id": "x", "values": {"price": 12.5}}

One line a change, in JSON; the first line says which log it is. A line is the whole of what the item has
become by then (all values that were ever said of it, by the column's name in the shop's files), so the last
line of an item is all that anybody needs. Each checksum is a crc32 that goes on from the line before: a line
that was changed, lost or moved does not fit. A tail that was torn by a crash is no part of the log; a damaged
line with good ones behind it is never skipped.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.errors import ReleaseError

UPDATE, UPSERT, REPLACE, DELETE = "update", "upsert", "replace", "delete"
FORMAT = 1
_DECODER = json.JSONDecoder()
_PIECE = 1 << 20  # bytes read and checked at once
_LONGEST = 1 << 30  # bytes of a line; more is no line


@dataclass(frozen=True)
class Entry:
    """Says what the changes up to `sequence` have made of one item.

    kind    update: where a release has the item, it gets these values; upsert: where it has not, too;
            replace: it has these values and no others; delete: it is gone
    born    the sequence number of the item's first change: new rows are given in this order
    """

    sequence: int
    born: int
    kind: str
    item_id: str
    values: dict[str, Any] = field(default_factory=dict)  # by column of the shop's files
    # By release id: an embedding means something to the release that it was brought for, and to no other
    embeddings: dict[str, list[float]] = field(default_factory=dict)


def log_folder(home: Path) -> Path:
    """Names the folder of the catalogue's log."""
    return home / ".live" / "catalogue"


def line_of(facts: dict[str, Any], previous: int) -> tuple[bytes, int]:
    """Writes one line of the log behind one whose checksum is `previous`; gives it and its own checksum."""
    text = json.dumps(facts, separators=(",", ":"), allow_nan=False).encode()
    checksum = zlib.crc32(text, previous)
    return b"%08x %s\n" % (checksum, text), checksum


def facts_of(entry: Entry) -> dict[str, Any]:
    """Gives an entry as a line has it: what is empty is left out."""
    return {name: value for name, value in vars(entry).items() if value not in ({}, [])}


class CatalogueReader:
    """Reads a log from its start on, as far as it is whole; never writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ReleaseError(f"cannot open {path}: {error.strerror}", _way_back(path)) from error
        weakref.finalize(self, os.close, self._descriptor)
        self.inode = os.fstat(self._descriptor).st_ino
        self.offset = self.sequence = self.checksum = 0
        self.id = self._read_header()

    def _read_header(self) -> str:
        """Gives the log's id; ReleaseError where the first line is none of ours."""
        lines = self._lines(_PIECE)
        try:
            facts = json.loads(lines[0][9:]) if lines and self._fits(lines[0], 0) else {}
        except ValueError:
            facts = {}
        if facts.get("format") != FORMAT or not isinstance(facts.get("log"), str):
            raise ReleaseError(
                f"{self.path} is no log of a catalogue, or its first line is damaged", _way_back(self.path)
            )
        self._step(lines[0])
        return str(facts["log"])

    def read(self) -> list[tuple[int, Entry]]:
        """Reads some of the next entries, each with its offset; none when there are no whole ones.

        Raises ReleaseError where the middle is damaged.
        """
        entries = []
        for line in self._lines(_PIECE):
            entry = self._entry(line)
            if entry is None:
                self._refuse_damage(self.offset + len(line) + 1, line)
                break
            entries.append((self.offset, entry))
            self._step(line)
            self.sequence = entry.sequence
        return entries

    def line_at(self, offset: int) -> Entry:
        """Reads the entry that was read at `offset` before."""
        size = 4096
        while (end := (raw := os.pread(self._descriptor, size, offset)).find(b"\n")) < 0:
            if len(raw) < size:
                raise ReleaseError(f"{self.path} ends within the line at offset {offset}", "put it back")
            size *= 4
        return _entry_of(raw[9:end])

    @property
    def torn_bytes(self) -> int:
        """Gives how much lies behind the last whole line."""
        return os.fstat(self._descriptor).st_size - self.offset

    def _lines(self, size: int) -> list[bytes]:
        """Reads the next whole lines, one at least where there is one."""
        while True:
            raw = os.pread(self._descriptor, size, self.offset)
            if (end := raw.rfind(b"\n")) >= 0:
                return raw[:end].split(b"\n")
            if len(raw) < size or size > _LONGEST:
                return []
            size *= 4

    def _step(self, line: bytes) -> None:
        """Goes on behind a good line."""
        self.offset += len(line) + 1
        self.checksum = int(line[:8], 16)

    def _entry(self, line: bytes) -> Entry | None:
        """Parses a line; None where it is not the one that belongs here."""
        if not self._fits(line, self.checksum):
            return None
        try:
            entry = _entry_of(line[9:])
        except (ValueError, TypeError):
            return None
        return entry if entry.sequence > self.sequence else None

    def _fits(self, line: bytes, previous: int) -> bool:
        """Says whether a line's checksum is its own, behind one of `previous`."""
        return line[:9] == b"%08x " % zlib.crc32(line[9:], previous)

    def _refuse_damage(self, behind: int, line: bytes) -> None:
        """Raises ReleaseError if good lines follow the damaged one; else it is a torn tail."""
        start, offset = self.offset, behind
        # What the last good checksum before a good line may be: that is damaged, too, or a line is now two
        before = [zlib.crc32(line[9:], self.checksum), _stored(line)]
        while lines := self._lines_from(offset):
            for other in lines:
                if any(self._fits(other, previous) for previous in before):
                    raise ReleaseError(
                        f"{self.path} is damaged at offset {start}, with whole lines behind it",
                        _way_back(self.path, start),
                    )
                before, offset = [*before, _stored(other)][-4:], offset + len(other) + 1

    def _lines_from(self, offset: int) -> list[bytes]:
        """Reads whole lines from another place."""
        here, self.offset = self.offset, offset
        try:
            return self._lines(_PIECE)
        finally:
            self.offset = here


def _stored(line: bytes) -> int:
    """Gives the checksum that a line says it has; 0 where that is damaged, too."""
    try:
        return int(line[:8], 16)
    except ValueError:
        return 0


def _entry_of(text: bytes) -> Entry:
    """Parses the JSON of a line; by raw_decode, as a log may have millions of lines."""
    return Entry(**_DECODER.raw_decode(text.decode())[0])


def open_catalogue(home: Path) -> CatalogueReader | None:
    """Opens the log of a repository, or of the home of several servers, for reading; None where nothing was
    changed yet."""
    path = log_folder(home) / "log"
    return CatalogueReader(path) if path.exists() else None


def last_sequence(home: Path) -> int:
    """Gives the number of the last change, by a look at the log's end; 0 where nothing was changed, or where
    that cannot be read."""
    try:
        with (log_folder(home) / "log").open("rb") as file:
            size, length = file.seek(0, os.SEEK_END), 1 << 16
            while True:
                file.seek(max(0, size - length))
                lines = file.read(length).split(b"\n")
                if len(lines) > 2 or length >= size:
                    break
                length *= 8
        return int(json.loads(lines[-2][9:]).get("sequence", 0))
    except (OSError, ValueError, IndexError):
        return 0


def last_entries(reader: CatalogueReader) -> dict[str, Entry]:
    """Reads what every changed item is now: by id, in the order of the last changes."""
    last: dict[str, Entry] = {}
    for _, entry in all_entries(reader):
        last.pop(entry.item_id, None)
        last[entry.item_id] = entry
    return last


def all_entries(reader: CatalogueReader) -> Iterator[tuple[int, Entry]]:
    """Reads all that is left of a log, with offsets."""
    while entries := reader.read():
        yield from entries


def _way_back(path: Path, offset: int = 0) -> str:
    """Says what to do about a damaged log."""
    keep = f"cut it there (`truncate -s {offset} {path}`: changes from there on are lost)" if offset else ""
    last = f"put a copy of it back, or move {path.parent} away: all changes are lost"
    return f"{keep}, or {last}" if keep else last

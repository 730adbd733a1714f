"""Writes the catalogue's log, as the only one: appends durably, and knows where each item's last line is."""

from __future__ import annotations

import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.live.catalogue import FORMAT, CatalogueReader, Entry, all_entries, facts_of, line_of, log_folder
from ensemble.release.files import sync_folder, try_flock


class CatalogueLog:
    """Holds the log's lock while it is open.

    Items are numbered in the order in which they were first met (`number`): what an overlay knows of an item
    lies in an array by that.
    """

    def __init__(self, home: Path, note: Callable[[str], None] = lambda line: None) -> None:
        self.note, self.folder = note, log_folder(home)
        self.path = self.folder / "log"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ReleaseError(f"cannot write {self.folder}: {error.strerror}") from error
        self._descriptor = -1
        if not try_flock(self._lock):
            os.close(self._lock)
            raise ReleaseError(f"another process writes the items of {home}", "use it, or stop it")
        try:
            if not self.path.exists():
                _create(self.path)
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Reads the whole log, and cuts off what a crash has torn."""
        self._reader = CatalogueReader(self.path)
        self._numbers: dict[str, int] = {}
        self._ids: list[str] = []
        self._offsets, self._lasts, self._borns = array("q"), array("q"), array("q")
        self.num_lines = 0
        for offset, entry in all_entries(self._reader):
            self._note_place(entry, offset)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        if torn := self._reader.torn_bytes:
            os.ftruncate(self._descriptor, self._reader.offset)
            os.fsync(self._descriptor)
            self.note(
                f"{self.path}: the last {torn} bytes were torn by a crash and are cut off; whole up to "
                f"sequence {self.sequence}"
            )

    @property
    def id(self) -> str:
        """Gives the log's id: a release's watermark counts in one log only."""
        return self._reader.id

    @property
    def sequence(self) -> int:
        """Gives the number of the last change."""
        return self._reader.sequence

    @property
    def num_items(self) -> int:
        """Gives how many items were ever changed."""
        return len(self._numbers)

    def number(self, item_id: str) -> int:
        """Gives an item's number; -1 for one that was never changed."""
        return self._numbers.get(item_id, -1)

    def ids(self, start: int = 0) -> list[str]:
        """Gives the ids of items from number `start` on, by number."""
        return self._ids[start:]

    def borns(self, start: int = 0) -> Array:
        """Gives the first change's number of items from number `start` on: [n] int64."""
        return np.array(self._borns[start:], np.int64)

    def entry(self, item_id: str) -> Entry | None:
        """Reads what an item is now; None for one that was never changed."""
        number = self.number(item_id)
        return None if number < 0 else self._reader.line_at(self._offsets[number])

    def since(self, sequence: int) -> Iterator[Entry]:
        """Reads what became of the items that were changed after `sequence`, by their last change."""
        offsets = np.sort(np.array(self._offsets, np.int64)[np.array(self._lasts, np.int64) > sequence])
        for offset in offsets.tolist():
            yield self._reader.line_at(offset)

    def append(self, entries: Sequence[Entry]) -> list[Entry]:
        """Makes entries durable, all or none, and gives them with their sequence numbers."""
        numbered, lines, checksum = [], [], self._reader.checksum
        for sequence, entry in enumerate(entries, self.sequence + 1):
            number = self.number(entry.item_id)
            born = sequence if number < 0 else self._borns[number]
            numbered.append(replace(entry, sequence=sequence, born=born))
            line, checksum = line_of(facts_of(numbered[-1]), checksum)
            lines.append(line)
        start = self._reader.offset
        _write_or_undo(self._descriptor, self.path, b"".join(lines), start)
        for entry, line in zip(numbered, lines, strict=True):
            self._note_place(entry, start)
            start += len(line)
        self._reader.offset, self._reader.checksum = start, checksum
        self._reader.sequence += len(entries)
        return numbered

    def _note_place(self, entry: Entry, offset: int) -> None:
        """Remembers where an item's last line is."""
        number = self._numbers.setdefault(entry.item_id, len(self._numbers))
        if number == len(self._ids):
            self._ids.append(entry.item_id)
            for column, value in ((self._offsets, 0), (self._lasts, 0), (self._borns, entry.born)):
                column.append(value)
        self._offsets[number], self._lasts[number] = offset, entry.sequence
        self.num_lines += 1

    @property
    def num_bytes(self) -> int:
        """Gives the log's size."""
        return self._reader.offset

    def compact(self) -> int:
        """Keeps each item's last line and drops the others; gives how many were dropped.

        The last lines say all that any release needs to know, whatever it was built from. A deleted item
        keeps its line: a past may name its row. The new log is read back before it takes the old one's place.
        """
        staged, before = self.path.with_name(".log.new"), self.num_lines
        try:
            with staged.open("wb") as file:
                header, checksum = line_of({"format": FORMAT, "log": self.id}, 0)
                file.write(header)
                for entry in self.since(0):
                    line, checksum = line_of(facts_of(entry), checksum)
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            again = CatalogueReader(staged)
            places = [(entry.item_id, offset) for offset, entry in all_entries(again)]
            if len(places) != self.num_items or again.sequence != self.sequence or again.torn_bytes:
                raise ReleaseError(f"{staged} does not read as it was written; {self.path} stays as it is")
            descriptor = os.open(staged, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            staged.rename(self.path)
        except OSError as error:
            raise ReleaseError(f"cannot write {staged}: {error.strerror}; the log stays as it is") from error
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(self.folder)
        os.close(self._descriptor)
        self._descriptor, self._reader, self.num_lines = descriptor, again, len(places)
        for item_id, offset in places:
            self._offsets[self._numbers[item_id]] = offset
        return before - self.num_lines

    def adopt(self, other: Path) -> int:
        """Takes the place of this log by a later state of it, which another home has written; gives the last
        change's number.

        ReleaseError where it is another log, unless nothing was ever changed here, or where changes of this
        one are not in it.
        """
        staged = self.path.with_name(".log.new")
        try:
            shutil.copyfile(other, staged)
            again = CatalogueReader(staged)
            last = {entry.item_id: entry for _, entry in all_entries(again)}
            self._refuse_fork(again, last)
            with staged.open("rb+") as file:
                file.truncate(again.offset)
                os.fsync(file.fileno())
            staged.rename(self.path)
        except OSError as error:
            raise ReleaseError(f"cannot write {staged}: {error.strerror}; the log stays as it is") from error
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(self.folder)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._numbers.clear()
        self._open()
        return self.sequence

    def _refuse_fork(self, again: CatalogueReader, last: dict[str, Entry]) -> None:
        """Raises ReleaseError unless a log goes on from this one."""
        if self.num_lines and again.id != self.id:
            raise ReleaseError(
                f"{self.path} is the log {self.id} with changes of its own, what came is {again.id}",
                "items are changed in one home alone; move the folder away to take what came",
            )
        for entry in self.since(0):
            later = last.get(entry.item_id)
            if (
                later is None
                or later.sequence < entry.sequence
                or (later.sequence == entry.sequence and later != entry)
            ):
                raise ReleaseError(
                    f"{self.path} has a change of item {entry.item_id!r} (number {entry.sequence}) that is "
                    "not in what came: items were changed here, too",
                    "change items in one home alone; push from the one that has all changes",
                )

    def close(self) -> None:
        """Gives the lock back."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1


def _create(path: Path) -> None:
    """Creates an empty log; it is durable before it has its name."""
    staged = path.with_name(".log.new")
    with staged.open("wb") as file:
        file.write(line_of({"format": FORMAT, "log": secrets.token_hex(8)}, 0)[0])
        file.flush()
        os.fsync(file.fileno())
    staged.rename(path)
    sync_folder(path.parent)


def _write_or_undo(descriptor: int, path: Path, data: bytes, start: int) -> None:
    """Writes data at the end of a file and down to the disk; nothing of it stays where that fails."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        # A full disk: nothing of the group may stay, or later groups would lie behind a torn one.
        os.ftruncate(descriptor, start)
        raise ReleaseError(f"cannot write {path}: {error.strerror}; nothing was changed") from error

"""Makes an overlay: what the catalogue's log is for one release, encoded by the release's own encoder.

All of an overlay follows from the release and the log, its rows too, whatever was merged, compacted or lost
meanwhile: an item that the release has keeps its row, all others that the log names follow in the order of
their first change. So an overlay may be thrown away at any time, and pasts that name its rows stay right.
"""

from __future__ import annotations

import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.live.catalogue import DELETE as GONE
from ensemble.live.catalogue import UPDATE, Entry
from ensemble.live.catalogue_log import CatalogueLog
from ensemble.live.encoding import ItemEncoding
from ensemble.live.generations import Current, point_to, read_current
from ensemble.live.items import LiveItems
from ensemble.live.log import CHANGE, DELETE, LogReader, LogWriter, OldLog, Origin, create_log, record_dtype
from ensemble.live.new_values import NewValues, values_file
from ensemble.live.segment import check_segment, part_from_records, replaced_by
from ensemble.release.release import Release

_PIECE = 2048  # entries encoded at once
SEALED_AT_ONCE = 50_000  # changes of an overlay that is made again: each so many become a segment


class Overlay:
    """Writes one release's overlay; whoever has it open holds the catalogue's lock."""

    def __init__(
        self, release: Release, catalogue: CatalogueLog, note: Callable[[str], None] = lambda line: None
    ) -> None:
        self.release, self.catalogue, self.note = release, catalogue, note
        self.folder = release.live_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.origin = Origin(catalogue.id, watermark_in(release, catalogue))
        self._values: NewValues  # set by _use_values, whichever way the overlay is opened
        self._current: Current  # what is served; as above
        self._encoding: ItemEncoding | None = None
        self._rows = array("q")  # by the catalogue's number of an item
        self._next_row = len(release.items)
        self._place_new()
        self._log, self.live = self._opened()
        self.catch_up()

    def _opened(self) -> tuple[LogWriter, LiveItems]:
        """Opens the overlay where it is whole, of this log and not far behind it; else makes it again."""
        if not (self.folder / "current").exists():
            return self._made_again()
        try:
            self._current = read_current(self.folder)
            for name in self._current.segments:
                check_segment(self.folder / name)
            live = LiveItems(self.release)  # reads all of it
            reader = self._checked_reader(live)
        except OldLog:
            raise
        except ReleaseError as error:
            self.note(f"items: {error.fact}; it is made again from {self.catalogue.path}")
            return self._made_again()
        if self.catalogue.sequence - reader.sequence > SEALED_AT_ONCE:
            return self._made_again()  # in segments, rather than one by one into a long log
        self._sweep()
        return LogWriter(self._log_path, reader), live

    def _checked_reader(self, live: LiveItems) -> LogReader:
        """Gives the log that a view has read; ReleaseError unless it is this catalogue's, and has all values
        that its rows name."""
        reader = live.view.state.reader
        assert reader is not None
        if replace(reader.origin, values=0) != self.origin or reader.sequence > self.catalogue.sequence:
            raise ReleaseError(f"{self._log_path} is of another catalogue log")
        self._use_values(reader.origin.values)
        state = live.view.state
        for codes in (state.slots["codes"], *(one.part.items["codes"] for one in state.segments)):
            if not self._values.has_all(codes):
                raise ReleaseError(f"{self._values.path} lacks values that {self.folder} has")
        return reader

    @property
    def _log_path(self) -> Path:
        """Names the log that is written to."""
        return self.folder / f"log-{self._current.generation}"

    def _made_again(self) -> tuple[LogWriter, LiveItems]:
        """Makes the overlay from the catalogue's log alone, beside what is there, and turns to it when it is
        whole."""
        numbers = (re.sub("^(log-|values-|g)", "", path.name) for path in self.folder.iterdir())
        number = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
        shutil.rmtree(self.folder / f".merging-{os.getpid()}", ignore_errors=True)
        self._use_values(number)
        segments, sequence, last = self._sealed(number)
        self._current = Current(last, tuple(segments))
        create_log(self._log_path, self.release.schema, last, sequence, self.origin)
        log = LogWriter(self._log_path, LogReader(self._log_path, self.release.schema))
        self._derive_into(log)
        point_to(self.folder, self._current)
        self._sweep()
        return log, LiveItems(self.release)

    def _sealed(self, number: int) -> tuple[list[str], int, int]:
        """Seals what the catalogue's log has, but for its last changes, into segments from `number` on.

        Gives the segments' names, how far they go, and the next number.
        """
        segments: list[str] = []
        sequence, entries = self.origin.watermark, self.catalogue.since(self.origin.watermark)
        while len(piece := list(islice(entries, SEALED_AT_ONCE))) == SEALED_AT_ONCE:
            from ensemble.live.merge import seal  # Faiss is not for writers that never need it

            records = np.concatenate(list(self._records_of(piece)))
            sequence = piece[-1].sequence
            part = part_from_records(records, len(self.release.items))
            segments = seal(self.release, number, segments, part, sequence)
            number += 1
        return segments, sequence, number

    def _use_values(self, number: int) -> None:
        """Opens the file of values that the release's vocabularies lack."""
        self._values = NewValues(values_file(self.folder, number), self.release.schema)
        self.origin, self._encoding = replace(self.origin, values=number), None

    @property
    def sequence(self) -> int:
        """Gives the number of the last change that is in it."""
        return self._log.sequence

    @property
    def encoding(self) -> ItemEncoding:
        """Opens the encoder when the first item has to be encoded: an engine's memory is not for deletes."""
        if self._encoding is None:
            self._encoding = ItemEncoding(self.release, self._values)
        return self._encoding

    def here(self, ids: Sequence[str]) -> Array:
        """Says which items the release has as things are now: [n] bool."""
        numbers = np.array([self.catalogue.number(item_id) for item_id in ids], np.int64)
        rows = self.release.item_ids.rows_from_ids(np.array([item_id.encode() for item_id in ids]))
        changed, view = np.flatnonzero(numbers >= 0), self.live.view
        rows[changed] = [self._rows[number] for number in numbers[changed].tolist()]
        rows[rows >= view.num_rows] = 0
        return (rows > 0) & ~view.is_deleted(rows)

    def records(self, entries: Sequence[Entry], given: Sequence[frozenset[str]] | None = None) -> Array:
        """Encodes entries: records [n] whose rows and sequence numbers append() fills in.

        `given` as in ItemEncoding.rows, for entries that come from a caller.
        """
        records = np.zeros(len(entries), record_dtype(self.release.schema))
        if not entries:
            return records
        records["id"] = [entry.item_id.encode() for entry in entries]
        is_known = self.release.item_ids.rows_from_ids(records["id"]) > 0
        here = [
            entry.kind != GONE and (known or entry.kind != UPDATE)
            for entry, known in zip(entries, is_known.tolist(), strict=True)
        ]
        records["kind"] = np.where(here, CHANGE, DELETE)
        places = np.flatnonzero(here)
        if len(places):
            of_callers = None if given is None else [given[place] for place in places]
            packed, numbers, good = self.encoding.rows([entries[place] for place in places], of_callers)
            records["item"][places], records["numbers"][places] = packed, numbers
            records["kind"][places[~good]] = DELETE
            self._values.flush()  # before any row that has their codes
        return records

    def append(self, entries: Sequence[Entry], records: Array) -> None:
        """Puts entries of the log, encoded by records(), into the overlay, and follows it."""
        self._fill_in(entries, records)
        self._log.append(records)
        self._follow()

    def catch_up(self) -> None:
        """Takes in all that the log has and the overlay has not."""
        if self.sequence < self.catalogue.sequence:
            self._place_new()
            self._derive_into(self._log)
        self._follow()

    def _derive_into(self, log: LogWriter) -> None:
        """Encodes what the catalogue's log has behind `log`'s last record."""
        for records in self._records_of(self.catalogue.since(log.sequence)):
            log.append(records)

    def _records_of(self, entries: Iterable[Entry]) -> Iterator[Array]:
        """Encodes entries of the log, some at a time: records [n]."""
        entries = iter(entries)
        while piece := list(islice(entries, _PIECE)):
            records = self.records(piece)
            self._fill_in(piece, records)
            yield records

    def _fill_in(self, entries: Sequence[Entry], records: Array) -> None:
        """Gives records [n] their rows and sequence numbers."""
        self._place_new()
        records["row"] = [self._rows[self.catalogue.number(entry.item_id)] for entry in entries]
        records["sequence"] = [entry.sequence for entry in entries]

    def _place_new(self) -> None:
        """Gives each item that has come into the catalogue's log its row, for good."""
        start = len(self._rows)
        if start == self.catalogue.num_items:
            return
        ids = np.array([item_id.encode() for item_id in self.catalogue.ids(start)])
        rows = self.release.item_ids.rows_from_ids(ids)
        new = np.flatnonzero(rows == 0)
        new = new[np.argsort(self.catalogue.borns(start)[new], kind="stable")]
        rows[new] = self._next_row + np.arange(len(new))
        self._next_row += len(new)
        self._rows.extend(rows.tolist())

    def _follow(self) -> None:
        """Makes our own view the newest."""
        while self.live.view.sequence < self._log.sequence:
            self.live.refresh()
            if self.live.fault:
                raise ReleaseError(self.live.fault)

    def turn_to(self, generation: int, merged: int) -> None:
        """Makes a finished segment, which has all changes up to `merged`, part of what is served.

        Later changes move to a new log.
        """
        segment, old = f"g{generation}", self._current
        replaced = replaced_by(self.folder / segment)
        kept = [name for name in old.segments if name not in replaced]
        reader = LogReader(self._log_path, self.release.schema)
        self._current = Current(generation, (*kept, segment), old.segments)
        create_log(self._log_path, self.release.schema, generation, merged, self.origin)
        later = LogWriter(self._log_path, LogReader(self._log_path, self.release.schema))
        while len(records := reader.read()):
            later.append(records[records["sequence"] > merged].copy())
        point_to(self.folder, self._current)
        self._log = later
        while self.live.view.state.generation != generation or self.live.view.sequence < later.sequence:
            self.live.refresh()
            if self.live.fault:
                raise ReleaseError(self.live.fault)
        self._sweep()

    def _sweep(self) -> None:
        """Removes what no instance needs: all but this generation and the last one, and what a killed merge
        left."""
        current = self._current
        kept = {"current", "empty.faiss", "instances", f"values-{self.origin.values}"}
        kept |= {*current.segments, *current.before, self._log_path.name, f"log-{current.generation - 1}"}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def watermark_in(release: Release, catalogue: CatalogueLog) -> int:
    """Gives from which change of the log on the release has to be told; ReleaseError where the log is not as
    long as it was when the release was built from it."""
    mark = release.watermark
    if mark.log != catalogue.id:
        return 0  # built where there was another log, or none
    if mark.sequence > catalogue.sequence:
        raise ReleaseError(
            f"{catalogue.path} ends at change {catalogue.sequence}, but release {release.name} was built "
            f"from it up to change {mark.sequence}",
            "put the whole log back: later changes would have numbers that the release takes for old",
        )
    return mark.sequence

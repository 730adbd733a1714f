"""Holds what changes have made of a release's items, and shows it as of one change.

A row belongs to an id for good: an update gives the row new content, a delete hides it, adding it again shows
it again. So histories, transitions and id maps that name rows stay right. New content lies in slots: first
those of the sealed segments, mapped from files, then those of the log behind them, the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.live.generations import Current
from ensemble.live.log import DELETE, LogReader
from ensemble.live.new_values import NewValues, values_file
from ensemble.live.segment import SearchedIndex, Segment
from ensemble.release.release import Release
from ensemble.release.snapshot import gather
from ensemble.schema import number_names

# Slots of the tail at first; untouched pages cost nothing, and growing later costs a request a copy of all
_ROOM = 1 << 16
_ROWS_ROOM = 1 << 20  # rows behind the release's own; untouched pages cost nothing


class LiveState:
    """Holds the segments of one generation and the log behind them.

    Arrays only grow, slots are never written twice: an old view stays right.
    """

    def __init__(
        self,
        release: Release,
        folder: Path,
        current: Current | None,
        opened: Mapping[str, Segment] | None = None,
    ) -> None:
        """Opens a generation, None: without any change; `opened` has segments that are open already."""
        self.release, self.generation = release, current.generation if current else 0
        self.items, self.ids = release.items, release.item_ids
        self.num_base = len(self.items)
        self.slots = np.zeros(_ROOM, self.items.dtype)
        self.numbers = np.zeros((_ROOM, max(1, len(number_names(release.schema)))), np.float32)
        self.slot_rows = np.zeros(_ROOM, np.int64)
        # Slot + 1, 0: the release's own content
        self.slot_of_row = np.zeros(self.num_base + _ROWS_ROOM, np.int32)
        self.deleted = np.zeros(len(self.slot_of_row), bool)
        self.names: dict[int, bytes] = {}  # ids of the tail's rows behind the release's own
        self.row_of_name: dict[bytes, int] = {}
        self.num_rows, self.num_slots, self.num_stale, self.num_deleted = self.num_base, 0, 0, 0
        self.num_records = 0  # of the tail, deletions too
        self.main: SearchedIndex | None = None
        self.new_values: NewValues | None = None
        self.reader: LogReader | None = None
        self.segments: list[Segment] = []
        if current is not None:
            known = opened or {}
            self.segments = [known.get(name) or Segment(folder / name) for name in current.segments]
            self.reader = LogReader(folder / f"log-{current.generation}", release.schema)
            self.new_values = NewValues(values_file(folder, self.reader.origin.values), release.schema)
        self.starts = np.cumsum([0, *map(len, self.segments)])  # of the segments' slots, and of the tail's
        for segment, start in zip(self.segments, self.starts.tolist(), strict=False):
            self._take_segment(segment, start)
        self.tail_start = self.num_slots = int(self.starts[-1])

    def _take_segment(self, segment: Segment, start: int) -> None:
        """Notes what a segment has of which rows."""
        part = segment.part
        self._reach(segment.last_row)
        rows, gone = np.asarray(part.rows), np.asarray(part.gone)
        touched = np.union1d(rows, gone)
        had = self._note_touched(touched)
        self.slot_of_row[rows] = start + 1 + np.arange(len(rows))
        self.deleted[rows] = False
        self.deleted[gone] = True
        self.num_deleted += int(np.count_nonzero(self.deleted[touched])) - had

    def apply(self, records: Array) -> None:
        """Applies changes [n], in order; the last of a row is what it becomes."""
        rows = records["row"].astype(np.int64)
        self._reach(int(rows.max(initial=0)))
        for row, name in zip(rows.tolist(), records["id"].tolist(), strict=True):
            if row >= self.num_base:
                self.names[row] = name
                self.row_of_name[name] = row
        self._make_room(len(records))
        kept = records[records["kind"] != DELETE]
        first = self.num_slots - self.tail_start
        places = slice(first, first + len(kept))
        self.slots[places], self.slot_rows[places] = kept["item"], kept["row"]
        self.numbers[places] = kept["numbers"]
        touched = np.unique(rows)
        had = self._note_touched(touched)
        self.slot_of_row[kept["row"]] = self.num_slots + 1 + np.arange(len(kept))
        self.deleted[rows] = records["kind"] == DELETE
        self.num_slots += len(kept)
        self.num_records += len(records)
        self.num_deleted += int(np.count_nonzero(self.deleted[touched])) - had

    def _note_touched(self, rows: Array) -> int:
        """Counts which of distinct rows [n] the main index holds with old content from now on; gives how many
        are deleted so far."""
        deleted = self.deleted[rows]
        self.num_stale += int(
            np.count_nonzero((rows < self.num_base) & (self.slot_of_row[rows] == 0) & ~deleted)
        )
        return int(np.count_nonzero(deleted))

    def _reach(self, row: int) -> None:
        """Makes the arrays over rows as long as `row`; rows without a name yet are as deleted ones, for the
        changes of their items come later."""
        if row >= len(self.slot_of_row):
            length = max(2 * len(self.slot_of_row), row + 1)
            self.slot_of_row, self.deleted = _longer(self.slot_of_row, length), _longer(self.deleted, length)
        if row >= self.num_rows:
            self.deleted[self.num_rows : row + 1] = True
            self.num_deleted += row + 1 - self.num_rows
            self.num_rows = row + 1

    def _make_room(self, more: int) -> None:
        """Makes the tail's arrays longer if `more` slots do not fit."""
        room, wanted = len(self.slots), self.num_slots - self.tail_start + more
        while room < wanted:
            room *= 2
        if room > len(self.slots):  # new arrays: views go on reading the old ones
            self.slots, self.numbers = _longer(self.slots, room), _longer(self.numbers, room)
            self.slot_rows = _longer(self.slot_rows, room)

    def content(self, places: Array, field: str) -> Array:
        """Gathers a field of the slots at places [n] int64 -> [n, width], contiguous."""
        if not self.segments:
            return self.slots[field][places]
        out = np.empty((len(places), *self.slots[field].shape[1:]), self.slots[field].dtype)
        which = np.searchsorted(self.starts, places, side="right") - 1
        for place in np.unique(which).tolist():
            mine = np.flatnonzero(which == place)
            table = self.slots if place == len(self.segments) else self.segments[place].part.items
            out[mine] = table[field][places[mine] - self.starts[place]]
        return out

    def placed(self) -> Iterator[tuple[Segment, int]]:
        """Gives the segments, each with the number of its first slot."""
        return zip(self.segments, self.starts.tolist(), strict=False)

    def view(self) -> LiveView:
        """Gives the view of all that was applied by now."""
        sequence = self.reader.sequence if self.reader else self.release.watermark.sequence
        return LiveView(self, sequence, self.num_rows, self.num_slots, self.num_stale, self.num_deleted)


def _longer(array: Array, length: int) -> Array:
    """Copies an array into one of `length`, with zeros behind it."""
    out = np.zeros((length, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


@dataclass(frozen=True, eq=False)
class LiveView:
    """Shows the items as of one sequence number; a step works with it from its first line to its last."""

    state: LiveState
    sequence: int  # of the last change that is in it
    num_rows: int  # row 0 and new ones included
    num_slots: int
    num_stale: int  # rows that the main index holds with old content
    num_deleted: int

    def gather(self, rows: Array, field: str) -> Array:
        """Gathers a field of the items at rows [...] int64 -> [..., width], contiguous; 0 where a row is
        negative."""
        if self.is_as_built:
            return gather(rows, self.state.items, field)
        own, slots = self.split(rows)
        return self.put_slots(gather(own, self.state.items, field), slots, field)

    @property
    def is_as_built(self) -> bool:
        """Says whether every row is the release's own, with its own content."""
        return not self.num_slots and self.num_rows == self.state.num_base

    def split(self, rows: Array) -> tuple[Array, Array]:
        """Gives rows [...] int64 with -1 where a change has the content, and there its slot + 1, else 0.

        A deleted item's content is the release's own, or row 0's: that of its last slot would be there until
        the next merge, and a history that names the item would change with it.
        """
        slots = np.where(rows > 0, self.state.slot_of_row[np.maximum(rows, 0)], 0)
        if self.num_deleted:
            slots = np.where(self.state.deleted[np.maximum(rows, 0)], 0, slots)
        return np.where(slots > 0, -1, np.where(rows >= self.state.num_base, 0, rows)), slots

    def put_slots(self, out: Array, slots: Array, field: str) -> Array:
        """Writes the slots' content over `out` [..., width] where split() gave one, in place."""
        here = slots > 0
        if here.any():
            out[here] = self.state.content(slots[here] - 1, field)
        return out

    def rows_from_ids(self, ids: Array) -> Array:
        """Gives the rows [...] int64 of ids [...] S, 0 where unknown.

        A deleted item keeps its row: who saw it saw it.
        """
        rows = self.state.ids.rows_from_ids(ids)
        flat, found = np.asarray(ids, dtype="S").ravel(), rows.reshape(-1)
        for segment in self.state.segments:
            unknown = np.flatnonzero(found == 0)
            if len(unknown) and len(segment.part.ids):
                found[unknown] = segment.rows_from_ids(flat[unknown])
        if self.state.row_of_name:
            unknown = np.flatnonzero(found == 0)
            new = np.array([self.state.row_of_name.get(one, 0) for one in flat[unknown].tolist()], np.int64)
            found[unknown] = np.where(new < self.num_rows, new, 0)
        return found.reshape(np.shape(ids))

    def ids_from_rows(self, rows: Array) -> Array:
        """Gives the ids [...] S of rows [...] int64; empty for rows <= 0."""
        base = self.state.num_base
        ids = self.state.ids.ids_from_rows(np.where(rows < base, rows, 0))
        new = rows >= base
        if new.any():
            names = self._new_ids(rows[new])
            ids = ids.astype(f"S{max(ids.dtype.itemsize, names.dtype.itemsize)}")
            ids[new] = names
        return ids

    def _new_ids(self, rows: Array) -> Array:
        """Gives the ids [n] S of rows [n] behind the release's own."""
        names = np.array([self.state.names.get(row, b"") for row in rows.tolist()], dtype="S")
        for segment in self.state.segments:
            left = np.flatnonzero(names == b"")
            if len(left):
                more = segment.ids_from_rows(rows[left])
                names = names.astype(f"S{max(names.dtype.itemsize, more.dtype.itemsize)}")
                names[left] = more
        return names

    def is_deleted(self, rows: Array) -> Array:
        """Says which of rows [...] are deleted: [...] bool; not for rows below 0."""
        return self.state.deleted[np.maximum(rows, 0)]

    @property
    def tail(self) -> slice:
        """Gives the tail's slots, which only an exact search finds, as places in the state's arrays."""
        return slice(0, self.num_slots - self.state.tail_start)

    def is_stale(self, rows: Array) -> Array:
        """Says which of the release's own rows [...] the main index has with old content: [...] bool."""
        slots = self.state.slot_of_row[rows]
        stale = ((slots > 0) & (slots <= self.num_slots)) | self.state.deleted[rows]
        later = (slots > self.num_slots) & ~stale
        if later.any():  # changed after this view, and perhaps before, too
            before = np.isin(rows[later], self.state.slot_rows[self.tail])
            for segment in self.state.segments:
                before |= segment.has(rows[later])
            stale[later] = before
        return stale

    def is_current(self, rows: Array, slots: Array) -> Array:
        """Says at which of `slots` [...], numbered from 0, rows [...] have their content now: [...] bool."""
        latest = self.state.slot_of_row[rows]
        # A slot beyond this view is a later change's: until then, ours counts
        return ((latest == slots + 1) | (latest > self.num_slots)) & ~self.state.deleted[rows]

    @cached_property
    def fresh(self) -> Array:
        """Says which of the release's own rows are in the main index as they are: [num_base]; row 0 never."""
        fresh = ~self.is_stale(np.arange(self.state.num_base))
        fresh[0] = False
        return fresh

    @cached_property
    def superseded(self) -> Array:
        """Says which slots of the tail hold an item that has a newer one, or is deleted: [t] bool."""
        rows = self.state.slot_rows[self.tail]
        return ~self.is_current(rows, np.arange(self.state.tail_start, self.num_slots))

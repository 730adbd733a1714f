"""Gives every instance its view of the items: the release's rows, with the log's changes over them.

A row belongs to an id for good: an update gives the row new content, a delete hides it, adding it again shows
it again. So histories, transitions and id maps that name rows stay right. New content lies in slots: main
index and delta are told apart by slot numbers.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import PeregrineError
from ensemble.live.catalogue import last_sequence
from ensemble.live.generations import current_generation, generation_records
from ensemble.live.instances import InstanceFile
from ensemble.live.log import DELETE, LogReader
from ensemble.live.new_values import NewValues, values_file
from ensemble.release.release import Release
from ensemble.release.snapshot import gather
from ensemble.schema import number_names

_POLL_S = 0.05
_AT_ONCE = 2048  # records applied by a request; a longer backlog is the thread's
# Records applied at once by the thread: it must not hold the interpreter from requests for longer than a copy
# of these takes
_PIECE = 512
# How long a request waits for the interpreter while the thread has it; Python's 5 ms, at each engine's
# return, are too much
_SWITCH_S = 0.0005
# Slots at first; untouched pages cost nothing, and growing later costs a request a copy of all
_ROOM = 1 << 16


class SearchedIndex(Protocol):
    """The main index, as far as a state has to know it; ensemble.index.main_index has the real one."""

    def search(self, query: Array, depth: int, mask: Array | None = None) -> tuple[Array, Array]:
        """Finds the best `depth` rows for each query [Q, D] among those that pass `mask`: rows and scores [Q,
        depth]."""
        ...


class LiveState:
    """Holds generation g and the log behind it.

    Arrays only grow, slots are never written twice: an old view stays right.
    """

    def __init__(self, release: Release, folder: Path, generation: int | None) -> None:
        self.release, self.generation = release, generation or 0
        self.items, self.ids = release.items, release.item_ids
        self.num_base = len(self.items)
        self.slots = np.zeros(_ROOM, self.items.dtype)
        # The slots' embeddings again, side by side: searched exactly
        self.vectors = np.zeros((_ROOM, self.items["embedding"].shape[1]), np.float32)
        self.numbers = np.zeros((_ROOM, max(1, len(number_names(release.schema)))), np.float32)
        self.slot_rows = np.zeros(_ROOM, np.int64)
        # Slot + 1, 0: the release's own content. Untouched pages cost nothing
        self.slot_of_row = np.zeros(self.num_base + (1 << 20), np.int32)
        self.deleted = np.zeros(len(self.slot_of_row), bool)
        self.new_ids: list[bytes] = []  # of rows num_base, num_base + 1, …
        self.row_of_new: dict[bytes, int] = {}
        self.num_slots = self.num_stale = self.num_deleted = 0
        self.main: SearchedIndex | None = None
        self.new_values: NewValues | None = None
        self.folder, self.reader, self.delta_start = folder / f"g{self.generation}", None, 0
        if generation is not None:
            self.reader = LogReader(folder / f"log-{self.generation}", release.schema)
            self.new_values = NewValues(values_file(folder, self.reader.origin.values), release.schema)
            self._load_generation()
        self.main_rows = self.num_base + len(self.new_ids)

    def _load_generation(self) -> None:
        """Applies what the generation has merged; the delta begins behind it."""
        if self.reader is not None and self.reader.has_merged:
            records = generation_records(self.folder, self.release.schema)
            for start in range(0, len(records), _PIECE):
                self.apply(records[start : start + _PIECE])
        self.delta_start, self.num_stale = self.num_slots, int(np.count_nonzero(self.deleted))

    def apply(self, records: Array) -> None:
        """Applies changes [n], in order; the last of a row is what it becomes."""
        rows = records["row"].astype(np.int64)
        self._make_room(len(records), int(rows.max(initial=0)))
        self._name_new(rows, records["id"])
        kept = records[records["kind"] != DELETE]
        places = slice(self.num_slots, self.num_slots + len(kept))
        self.slots[places], self.slot_rows[places] = kept["item"], kept["row"]
        self.numbers[places] = kept["numbers"]
        self.vectors[places] = kept["item"]["embedding"]
        touched = np.unique(rows)
        was_valid = (self.slot_of_row[touched] <= self.delta_start) & ~self.deleted[touched]
        had = int(np.count_nonzero(self.deleted[touched]))
        self.slot_of_row[kept["row"]] = self.num_slots + 1 + np.arange(len(kept))
        self.deleted[rows] = records["kind"] == DELETE
        self.num_slots += len(kept)
        self.num_stale += int(np.count_nonzero(was_valid))
        self.num_deleted += int(np.count_nonzero(self.deleted[touched])) - had

    def _name_new(self, rows: Array, ids: Array) -> None:
        """Takes the ids [n] S of rows [n] behind the release's own; a row that has no name yet is as one that
        is deleted, for its item's change comes later."""
        new = np.flatnonzero(rows >= self.num_base)
        if not len(new):
            return
        end, wanted = self.num_base + len(self.new_ids), int(rows[new].max()) + 1
        if wanted > end:
            self.deleted[end:wanted] = True
            self.num_deleted += wanted - end
            self.new_ids += [b""] * (wanted - end)
        for row, name in zip(rows[new].tolist(), ids[new].tolist(), strict=True):
            self.new_ids[row - self.num_base] = name
            self.row_of_new[name] = row

    def _make_room(self, more: int, last_row: int) -> None:
        """Makes the arrays longer if `more` slots, or `last_row`, do not fit."""
        room = len(self.slots)
        while room < self.num_slots + more:
            room *= 2
        if room > len(self.slots):  # new arrays: views go on reading the old ones
            self.slots, self.vectors, self.numbers = (
                _longer(a, room) for a in (self.slots, self.vectors, self.numbers)
            )
            self.slot_rows = _longer(self.slot_rows, room)
        if last_row >= len(self.slot_of_row):
            length = max(2 * len(self.slot_of_row), last_row + 1)
            self.slot_of_row, self.deleted = _longer(self.slot_of_row, length), _longer(self.deleted, length)

    def view(self) -> LiveView:
        """Gives the view of all that was applied by now."""
        sequence = self.reader.sequence if self.reader else self.release.watermark.sequence
        return LiveView(
            self,
            sequence,
            self.num_base + len(self.new_ids),
            self.num_slots,
            self.num_stale,
            self.num_deleted,
        )


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
        if not self.num_slots:
            return gather(rows, self.state.items, field)
        own, slots = self.split(rows)
        return self.put_slots(gather(own, self.state.items, field), slots, field)

    def split(self, rows: Array) -> tuple[Array, Array]:
        """Gives rows [...] int64 with 0 where the log has the content, and there its slot + 1, else 0."""
        slots = np.where(rows > 0, self.state.slot_of_row[np.maximum(rows, 0)], 0)
        return np.where((slots > 0) | (rows >= self.state.num_base), 0, rows), slots

    def put_slots(self, out: Array, slots: Array, field: str) -> Array:
        """Writes the slots' content over `out` [..., width] where split() gave one, in place."""
        here = slots > 0
        out[here] = self.state.slots[field][slots[here] - 1]
        return out

    def rows_from_ids(self, ids: Array) -> Array:
        """Gives the rows [...] int64 of ids [...] S, 0 where unknown.

        A deleted item keeps its row: who saw it saw it.
        """
        rows = self.state.ids.rows_from_ids(ids)
        if self.state.row_of_new:
            unknown = np.flatnonzero(rows.ravel() == 0)
            flat = np.asarray(ids, dtype="S").ravel()
            new = [self.state.row_of_new.get(one, 0) for one in flat[unknown].tolist()]
            rows.ravel()[unknown] = np.where(np.array(new, np.int64) < self.num_rows, new, 0) if new else 0
        return rows

    def ids_from_rows(self, rows: Array) -> Array:
        """Gives the ids [...] S of rows [...] int64; empty for rows <= 0."""
        base = self.state.num_base
        ids = self.state.ids.ids_from_rows(np.where(rows < base, rows, 0))
        new = rows >= base
        if new.any():
            names = np.array([self.state.new_ids[row] for row in (rows[new] - base).tolist()], dtype="S")
            ids = ids.astype(f"S{max(ids.dtype.itemsize, names.dtype.itemsize)}")
            ids[new] = names
        return ids

    def is_deleted(self, rows: Array) -> Array:
        """Says which of rows [...] are deleted: [...] bool; not for rows below 0."""
        return self.state.deleted[np.maximum(rows, 0)]

    @property
    def delta(self) -> slice:
        """Gives the slots of items that only an exact search beside the main index finds."""
        return slice(self.state.delta_start, self.num_slots)

    @cached_property
    def fresh(self) -> Array:
        """Says which rows' entries in the main index still count: [main rows] bool; row 0's never does."""
        fresh = ~self.state.deleted[: self.state.main_rows]
        changed = self.state.slot_rows[self.delta]
        fresh[changed[changed < len(fresh)]] = False
        fresh[0] = False
        return fresh

    @cached_property
    def superseded(self) -> Array:
        """Says which slots of the delta hold an item that has a newer one, or is deleted: [d] bool."""
        rows = self.state.slot_rows[self.delta]
        slots = self.state.slot_of_row[rows]
        # A slot beyond this view is a later change's: until then, ours counts
        return (
            (slots != np.arange(self.delta.start, self.delta.stop) + 1) & (slots <= self.num_slots)
        ) | self.state.deleted[rows]


class LiveItems:
    """Follows the log: `refresh` does at the start of a request, and a thread while there is none."""

    def __init__(self, release: Release) -> None:
        self.release, self.folder = release, release.live_folder
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._open_main: Callable[[LiveState], Any] | None = None
        self._instance: InstanceFile | None = None
        self._current = str(self.folder / "current")
        self._seen: tuple[int, int] | None = None  # the file `current` as it was: inode, time
        self.fault = ""  # why the log cannot be followed any further; what is served stays as it was
        self.view = self._opened()
        self.fault = self._what_is_missing()

    def attach(self, open_main: Callable[[LiveState], Any]) -> None:
        """Makes every state, this one and those to come, carry a main index."""
        with self._lock:
            self._open_main = open_main
            self.view.state.main = open_main(self.view.state)

    def refresh(self, limit: int = _AT_ONCE) -> LiveView:
        """Gives the newest view. Nothing new costs two system calls.

        While another thread is at it, the last view is the answer.
        """
        if not self._lock.acquire(blocking=False):
            return self.view
        try:
            self._catch_up(limit)
        except PeregrineError as error:
            self.fault = str(error)
        finally:
            self._lock.release()
        return self.view

    def follow(self) -> None:
        """Starts the thread that keeps the view fresh, opens generations, and publishes how far we are."""
        if self._thread is None:
            sys.setswitchinterval(_SWITCH_S)
            self._instance = InstanceFile(self.folder)
            self._thread = threading.Thread(target=self._follow, name="live-items", daemon=True)
            self._thread.start()

    def metrics(self) -> dict[str, float]:
        """Says how far this instance is, and whether it can go on."""
        view = self.view
        facts = {
            "live_sequence": view.sequence,
            "live_generation": view.state.generation,
            "live_delta_items": view.num_slots - view.state.delta_start,
        }
        return {**facts, "live_fault": bool(self.fault)}

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._instance is not None:
            self._instance.close()

    def _follow(self) -> None:
        """Is the thread: looks for news every _POLL_S."""
        while not self._stop.wait(_POLL_S):
            self._swap_if_new()
            self.refresh()
            if self._instance is not None:
                self._instance.publish(self.view.sequence)

    def _swap_if_new(self) -> None:
        """Opens a new generation beside the served one, then turns to it: one assignment."""
        if self._mark() != self._seen:
            try:
                view = self._opened()
                with self._lock:
                    self.view, self.fault = _caught_up(view), ""
            except PeregrineError as error:
                self.fault = str(error)

    def _catch_up(self, limit: int) -> None:
        """Applies at most `limit` new records."""
        if self._thread is None and self._mark() != self._seen:
            self.view, self.fault = self._opened(), ""
        state = self.view.state
        if state.reader is None or not state.reader.has_more():
            return
        records = state.reader.read(limit)
        if len(records):
            state.apply(records)
            self.view = state.view()
            if self._instance is not None:
                self._instance.publish(self.view.sequence)

    def _opened(self) -> LiveView:
        """Opens a new state, all of its log read."""
        self._seen = self._mark()
        view = _caught_up(
            LiveState(
                self.release, self.folder, current_generation(self.folder) if self._seen else None
            ).view()
        )
        if self._open_main is not None:
            view.state.main = self._open_main(view.state)
        return view

    def _what_is_missing(self) -> str:
        """Says what the catalogue's log has and no overlay here; empty where all is well."""
        if (
            self._seen is not None
            or last_sequence(self.release.repository) <= self.release.watermark.sequence
        ):
            return ""
        return (
            f"release {self.release.name} is served without the changes of items that are in "
            f"{self.release.repository}; start the writer, `peregrine serve` or `peregrine items serve`"
        )

    def _mark(self) -> tuple[int, int] | None:
        """Gives what tells the file `current` from another one: inode and time; None where there is none."""
        try:
            current = os.stat(self._current)
        except FileNotFoundError:
            return None
        return current.st_ino, current.st_mtime_ns


def _caught_up(view: LiveView) -> LiveView:
    """Gives the view with all that the log holds by now."""
    state = view.state
    while state.reader is not None and len(records := state.reader.read(_PIECE)):
        state.apply(records)
    return state.view() if state.reader is not None else view

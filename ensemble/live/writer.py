"""Changes items, as the only one: checks a group of changes, encodes what is new, appends the group to the
log."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.id_rule import encode_id
from ensemble.live.encoding import ItemEncoding
from ensemble.live.generations import current_generation, point_to
from ensemble.live.items import LiveItems
from ensemble.live.log import ADD, DELETE, UPDATE, LogReader, LogWriter, create_log, record_dtype
from ensemble.release.files import try_flock
from ensemble.release.release import Release

# {"op": "add" | "update" | "upsert" | "delete", "item": {"item_id": …, feature: value, …}}
Change = Mapping[str, Any]
OPERATIONS = ("add", "update", "upsert", "delete")
MAX_GROUP = 10_000  # changes at once


class ItemWriter:
    """Holds the lock of one release's live items while it is open."""

    def __init__(self, release: Release, note: Callable[[str], None] = lambda line: None) -> None:
        self.release, self.note, self.folder = release, note, release.live_folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not try_flock(self._lock):
            os.close(self._lock)
            raise ReleaseError(
                f"another process writes the live items of {release.name} in {release.repository}",
                "use it, or stop it",
            )
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._encoding: ItemEncoding | None = None

    def _open(self) -> None:
        """Opens the current generation's log, or creates the first; removes what no instance needs."""
        if not (self.folder / "current").exists():
            create_log(self.folder / "log-0", self.release.schema, 0, 0)
            point_to(self.folder, 0)
        generation = current_generation(self.folder)
        self._sweep(generation)
        self.live = LiveItems(self.release)
        reader = self.live.view.state.reader
        assert reader is not None
        self._log = LogWriter(self.folder / f"log-{generation}", self.release.schema, reader, self.note)

    @property
    def sequence(self) -> int:
        """Gives the number of the last change."""
        return self._log.sequence

    @property
    def encoding(self) -> ItemEncoding:
        """Opens the encoder when the first item has to be encoded: an engine's memory is not for deletes."""
        if self._encoding is None:
            self._encoding = ItemEncoding(self.release)
        return self._encoding

    def apply(self, changes: Sequence[Change]) -> int:
        """Makes all changes durable, or none of them; gives the last one's sequence number.

        InvalidInput names the first bad one.
        """
        records = self.records(changes)
        if len(records):
            self._log.append(records)
            while self.live.view.sequence < self._log.sequence:
                self.live.refresh()
                if self.live.fault:
                    raise ReleaseError(self.live.fault)
        return self._log.sequence

    def records(self, changes: Sequence[Change]) -> Array:
        """Checks and encodes changes: records [n], in order."""
        if len(changes) > MAX_GROUP:
            raise InvalidInput(
                f"at most {MAX_GROUP} changes at once, got {len(changes)}", "send them in parts"
            )
        ids = [_item_id(change) for change in changes]
        twice = next((item_id for item_id, count in Counter(ids).items() if count > 1), None)
        if twice is not None:
            raise InvalidInput(
                f"item {twice.decode()!r} is changed twice at once", "send the second change after the first"
            )
        rows, kinds = self._rows(changes, ids)
        records = np.zeros(len(changes), record_dtype(self.release.schema))
        records["id"], records["row"], records["kind"] = np.array(ids, dtype="S") if ids else b"", rows, kinds
        encoded = np.flatnonzero(records["kind"] != DELETE)
        if len(encoded):
            old, old_numbers, is_new = self._old(rows[encoded], records["kind"][encoded] == ADD)
            packed, numbers = self.encoding.rows(
                [changes[i]["item"] for i in encoded], old, old_numbers, is_new
            )
            records["item"][encoded], records["numbers"][encoded] = packed, numbers
        return records

    def _rows(self, changes: Sequence[Change], ids: list[bytes]) -> tuple[Array, Array]:
        """Gives each change's row and kind of record; an id keeps its row for good."""
        view = self.live.view
        rows = view.rows_from_ids(np.array(ids, dtype="S")) if ids else np.zeros(0, np.int64)
        here = (rows > 0) & ~view.is_deleted(rows)
        kinds = np.zeros(len(rows), np.uint8)
        for i, change in enumerate(changes):
            kind = change.get("op")
            if kind not in OPERATIONS:
                raise InvalidInput(
                    f"item {ids[i].decode()!r}: op {kind!r} is unknown", f"use {', '.join(OPERATIONS)}"
                )
            if kind == "add" and here[i]:
                raise InvalidInput(f"item {ids[i].decode()!r} exists already", "update it instead")
            if kind in ("update", "delete") and not here[i]:
                raise InvalidInput(
                    f"item {ids[i].decode()!r} is unknown",
                    f"{'add it first' if kind == 'update' else 'there is nothing to delete'}",
                )
            kinds[i] = DELETE if kind == "delete" else UPDATE if here[i] else ADD
        new = np.flatnonzero(rows == 0)
        rows[new] = view.num_rows + np.arange(len(new))
        return rows, kinds

    def _old(self, rows: Array, is_new: Array) -> tuple[Array, Array, Array]:
        """Gives the packed rows [n] and numbers [n, *] before the change, and is_new as it came."""
        state, known = self.live.view.state, np.where(is_new, 0, rows)
        slots = state.slot_of_row[known]
        old = np.array(state.items[np.where(slots > 0, 0, known)])
        numbers = np.array(self.release.item_numbers[np.where(slots > 0, 0, known)])
        old[slots > 0], numbers[slots > 0] = (
            state.slots[slots[slots > 0] - 1],
            state.numbers[slots[slots > 0] - 1],
        )
        return old, numbers, is_new

    def turn_to(self, generation: int, merged: int) -> None:
        """Makes a finished generation, which has all changes up to `merged`, the served one.

        Later changes move to its log.
        """
        path, schema = self.folder / f"log-{generation}", self.release.schema
        create_log(path, schema, generation, merged)
        later = LogWriter(path, schema, LogReader(path, schema), self.note)
        reader = LogReader(self._log.path, schema)
        while len(records := reader.read()):
            if len(kept := records[records["sequence"] > merged]):
                later.append(kept.copy())
        point_to(self.folder, generation)
        self._log = later
        while self.live.view.state.generation != generation or self.live.view.sequence < later.sequence:
            self.live.refresh()
            if self.live.fault:
                raise ReleaseError(self.live.fault)
        self._sweep(generation)

    def _sweep(self, generation: int) -> None:
        """Removes what no instance needs: generations before the last one, and what a killed merge left."""
        kept = {generation, generation - 1}
        for path in self.folder.iterdir():
            number = path.name.removeprefix("log-").removeprefix("g")
            if path.name.startswith(".merging-") or (number.isdigit() and int(number) not in kept):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Gives the lock back."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)


def _item_id(change: Change) -> bytes:
    """Gives the id of the item that is changed; InvalidInput if what came is no change, or has no such id."""
    item = change.get("item") if isinstance(change, Mapping) else None
    item_id = item.get("item_id") if isinstance(item, Mapping) else None
    if item_id is None:
        raise InvalidInput(
            "a change must be an operation and an item with an item_id (text or a whole number), got "
            f"{str(change)[:60]!r}"
        )
    return encode_id("item_id", item_id)

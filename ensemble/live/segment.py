"""Keeps the sealed parts of an overlay: what some range of changes has made of items, mapped from files.

A part never changes. Its rows ascend, each once, so that position p of its index is its p-th row; all
processes share one copy in page cache. Merging two parts costs what is in them, however large the catalogue
is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.live.log import DELETE
from ensemble.release.files import file_sha256
from ensemble.release.ids import IdMap
from ensemble.release.snapshot import item_dtype
from ensemble.schema import Schema, number_names

_ARRAYS = ("rows", "items", "numbers", "gone", "named", "ids", "sorted_ids", "sorted_rows")
_INDEX, _META = "index.faiss", "meta.json"
_PIECE = 1 << 14  # rows copied at once


class SearchedIndex(Protocol):
    """An index, as far as a state has to know it; ensemble.index.main_index has the real one."""

    def search(self, query: Array, depth: int, mask: Array | None = None) -> tuple[Array, Array]:
        """Finds the best `depth` positions + 1 for each query [Q, D] among those that pass `mask`: positions
        and scores [Q, depth]."""
        ...


@dataclass(frozen=True)
class Part:
    """Holds what a range of changes has made of items."""

    rows: Array  # [n] int64 ascending: the rows that have content here
    items: Array  # [n] snapshot.item_dtype
    numbers: Array  # [n, *] float32
    gone: Array  # [m] int64: the rows that are deleted at its end, with content or without
    named: Array  # [q] int64 ascending: rows behind the release's own that got their names
    ids: Array  # [q] S: these names


class Segment:
    """Maps a part that was sealed; `index` is there where somebody searches it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self._mark = folder, folder.name, _mark(folder)
        self.index: SearchedIndex | None = None
        try:
            arrays = {name: _mapped(folder / f"{name}.npy") for name in _ARRAYS}
        except (OSError, ValueError) as error:
            raise ReleaseError(f"cannot open {folder}: {error}", way_back(folder)) from None
        self.part = Part(*(arrays[name] for name in _ARRAYS[:6]))
        self._sorted_ids, self._sorted_rows = IdMap(arrays["sorted_ids"]), arrays["sorted_rows"]

    def __len__(self) -> int:
        return len(self.part.rows)

    @property
    def is_there(self) -> bool:
        """Says whether what stands under its name is still it: an overlay that is made again counts anew."""
        return self._mark == _mark(self.folder)

    @property
    def index_file(self) -> Path:
        """Names the file of its index."""
        return self.folder / _INDEX

    @cached_property
    def last_row(self) -> int:
        """Gives the greatest row that it has something of."""
        return max(
            (int(a[-1]) for a in (self.part.rows, self.part.named, self.part.gone) if len(a)), default=0
        )

    def rows_from_ids(self, ids: Array) -> Array:
        """Gives the rows [n] int64 of ids [n] S that it has named; 0 for others."""
        places = self._sorted_ids.rows_from_ids(ids)
        return (
            np.where(places > 0, self._sorted_rows[np.maximum(places, 1) - 1], 0)
            if len(self.part.ids)
            else places
        )

    def ids_from_rows(self, rows: Array) -> Array:
        """Gives the ids [n] S of rows [n] that it has named; empty for others."""
        if not len(self.part.named):
            return np.zeros(len(rows), "S1")
        place = np.minimum(np.searchsorted(self.part.named, rows), len(self.part.named) - 1)
        return np.where(self.part.named[place] == rows, self.part.ids[place], b"")

    def has(self, rows: Array) -> Array:
        """Says which rows [n] have content here: [n] bool."""
        if not len(self):
            return np.zeros(len(rows), bool)
        place = np.minimum(np.searchsorted(self.part.rows, rows), len(self) - 1)
        return self.part.rows[place] == rows


def _mapped(path: Path) -> Array:
    """Maps an array, as a plain one: memmap's own class makes every indexing slower."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _mark(folder: Path) -> tuple[int, int]:
    """Gives what tells a segment from another one of its name: inode and time; (0, 0) where there is none."""
    try:
        facts = (folder / "rows.npy").stat()
    except OSError:
        return 0, 0
    return facts.st_ino, facts.st_mtime_ns


def write_part(folder: Path, part: Part) -> None:
    """Writes a part into a folder, but for its index and meta.json."""
    order = np.argsort(part.ids, kind="stable")
    arrays = {**vars(part), "sorted_ids": part.ids[order], "sorted_rows": part.named[order]}
    for name in _ARRAYS:
        if not (folder / f"{name}.npy").exists():  # large ones were written in place
            np.save(folder / f"{name}.npy", arrays[name])


def write_meta(folder: Path, sequence: int, replaces: Sequence[str]) -> None:
    """Writes meta.json: the last change that is in it, the segments in whose place it comes, digests."""
    files = [path for path in sorted(folder.iterdir()) if path.name != _META]
    digests = {path.name: file_sha256(path) for path in files}
    facts = {"sequence": sequence, "replaces": list(replaces), "sha256": digests}
    (folder / _META).write_text(json.dumps(facts))


def replaced_by(folder: Path) -> list[str]:
    """Gives the names of the segments in whose place a segment comes."""
    return list(json.loads((folder / _META).read_text())["replaces"])


def check_segment(folder: Path) -> None:
    """Holds a segment's files against its meta.json; ReleaseError where they differ. Writers do it, once."""
    try:
        digests = json.loads((folder / _META).read_text())["sha256"]
        differing = [name for name, digest in digests.items() if file_sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        raise ReleaseError(f"cannot open {folder}: {error}", way_back(folder)) from None
    if differing:
        raise ReleaseError(f"{folder / differing[0]}: sha256 mismatch", way_back(folder))


def part_from_records(records: Array, num_base: int) -> Part:
    """Makes a part of an overlay's records [n] in their order."""
    row = records["row"].astype(np.int64)
    last = _last_of_each(row)
    changed = np.flatnonzero(records["kind"] != DELETE)
    content = changed[_last_of_each(row[changed])]
    named = last[row[last] >= num_base]
    ids = records["id"][named]
    return Part(
        row[content],
        records["item"][content],
        records["numbers"][content],
        row[last][records["kind"][last] == DELETE],
        row[named],
        ids.astype(f"S{max(1, int(np.char.str_len(ids).max(initial=1)))}"),
    )


def joined_part(parts: Sequence[Part], schema: Schema, folder: Path) -> Part:
    """Joins parts, the newest last, into one whose items and numbers lie in files of `folder`."""
    rows = np.concatenate([part.rows for part in parts])
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    last = _last_of_each(rows)
    shape = (len(last), max(1, len(number_names(schema))))
    items = np.lib.format.open_memmap(folder / "items.npy", "w+", item_dtype(schema), shape[:1])
    numbers = np.lib.format.open_memmap(folder / "numbers.npy", "w+", np.float32, shape)
    for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
        mine = np.flatnonzero((last >= start) & (last < end))
        for at in range(0, len(mine), _PIECE):
            to = mine[at : at + _PIECE]
            items[to], numbers[to] = part.items[last[to] - start], part.numbers[last[to] - start]
    items.flush()
    numbers.flush()
    # What happened to each row, in order: within a part, what is gone was changed before
    events = [event for part in parts for event in (part.rows, part.gone)]
    is_gone = np.repeat(np.tile([False, True], len(parts)), [len(event) for event in events])
    row = np.concatenate(events)
    ends = _last_of_each(row)
    names = np.concatenate([part.named for part in parts])
    first = _last_of_each(names)
    ids = np.concatenate([part.ids for part in parts])
    return Part(rows[last], items, numbers, row[ends][is_gone[ends]], names[first], ids[first])


def _last_of_each(rows: Array) -> Array:
    """Gives where each distinct row [n] stands for the last time: ascending by row."""
    order = np.argsort(rows, kind="stable")
    is_last = np.ones(len(rows), bool)
    is_last[:-1] = rows[order][1:] != rows[order][:-1]
    return order[is_last]


def way_back(folder: Path) -> str:
    """Says what to do about a damaged part."""
    return f"start the writer, `peregrine serve` or `peregrine items serve`: it makes {folder.parent} again"

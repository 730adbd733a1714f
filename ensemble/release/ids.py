"""Ids at the edge, rows inside: one sorted, memory-mapped array of bytes serves both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble.contract import MAX_ID_BYTES
from ensemble.errors import InvalidInput


class IdMap:
    """Row 0 is "unknown", row 1 + i is the i-th id in byte order. One mapped file, shared by all processes.

    Ten million ids of 12 bytes are 120 MB of page cache, whoever many open them; a lookup is a binary search
    over the whole batch at once.
    """

    def __init__(self, sorted_ids: np.ndarray) -> None:
        self.sorted_ids = sorted_ids  # [I] S<width>

    def __len__(self) -> int:
        return len(self.sorted_ids)

    def rows_from_ids(self, ids: np.ndarray) -> np.ndarray:
        """Ids [...] S or object of bytes -> rows [...] int64, 0 where unknown."""
        flat = np.asarray(
            ids, dtype="S"
        ).ravel()  # never cut to the map's width: a longer id would match its prefix
        if not len(self.sorted_ids):
            return np.zeros(np.shape(ids), np.int64)
        position = np.minimum(np.searchsorted(self.sorted_ids, flat), len(self.sorted_ids) - 1)
        rows = np.where(self.sorted_ids[position] == flat, position + 1, 0)
        return rows.reshape(np.shape(ids)).astype(np.int64)

    def ids_from_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows [...] int64 -> ids [...] S; empty for rows <= 0."""
        if not len(self.sorted_ids):
            return np.zeros(np.shape(rows), "S1")
        return np.where(rows > 0, self.sorted_ids[np.maximum(rows, 1) - 1], b"")


def write_ids(path: Path, sorted_ids: np.ndarray) -> None:
    """Writes the id map of `sorted_ids` [I] S; InvalidInput unless they are sorted, distinct and short
    enough."""
    if sorted_ids.dtype.itemsize > MAX_ID_BYTES:
        longest = max(sorted_ids, key=len)
        raise InvalidInput(
            f"id {longest.decode(errors='replace')!r} has {len(longest)} bytes",
            f"at most {MAX_ID_BYTES} are allowed",
        )
    if len(sorted_ids) > 1 and not (sorted_ids[:-1] < sorted_ids[1:]).all():
        raise InvalidInput("ids of an id map must be sorted and distinct")
    np.save(path, sorted_ids, allow_pickle=False)


def open_ids(path: Path) -> IdMap:
    """Memory-maps the id map at `path`."""
    return IdMap(np.load(path, mmap_mode="r", allow_pickle=False))

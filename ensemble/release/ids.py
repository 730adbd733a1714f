"""Maps ids, used at the edge, to rows, used inside, and back: one sorted array of bytes does both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.id_rule import MAX_ID_BYTES, id_fault


class IdMap:
    """Turns ids into rows and back: row 0 is "unknown", row 1 + i is the i-th id in byte order.

    Ten million ids of 12 bytes are 120 MB of page cache, which all processes share; a lookup is one binary
    search over the whole batch.
    """

    def __init__(self, sorted_ids: Array) -> None:
        self.sorted_ids = sorted_ids  # [I] S<width>, mapped from a file

    def __len__(self) -> int:
        return len(self.sorted_ids)

    def rows_from_ids(self, ids: Array) -> Array:
        """Gives the rows [...] int64 of ids [...] S or object of bytes; 0 where unknown."""
        flat = np.asarray(ids, dtype="S").ravel()
        if not len(self.sorted_ids):
            return np.zeros(np.shape(ids), np.int64)
        keys, fits = _cut(flat, self.sorted_ids.dtype)
        position = np.minimum(np.searchsorted(self.sorted_ids, keys), len(self.sorted_ids) - 1)
        rows = np.where((self.sorted_ids[position] == keys) & fits, position + 1, 0)
        return rows.reshape(np.shape(ids)).astype(np.int64)

    def ids_from_rows(self, rows: Array) -> Array:
        """Gives the ids [...] S of rows [...] int64; empty for rows <= 0."""
        if not len(self.sorted_ids):
            return np.zeros(np.shape(rows), "S1")
        return np.where(rows > 0, self.sorted_ids[np.maximum(rows, 1) - 1], b"")


def _cut(ids: Array, dtype: np.dtype) -> tuple[Array, Array | bool]:
    """Cuts ids [n] S to the map's width, and says which [n] bool were no longer: the others are in no map.

    np.searchsorted would otherwise copy the whole map to the width of the longest id.
    """
    if ids.dtype.itemsize <= dtype.itemsize:
        return ids, True
    rest = ids.view(np.uint8).reshape(len(ids), -1)[:, dtype.itemsize :]
    return ids.astype(dtype), ~rest.any(axis=1)


def write_ids(path: Path, sorted_ids: Array) -> None:
    """Writes the id map of ids [I] S; InvalidInput unless they are sorted, distinct and short enough."""
    if sorted_ids.dtype.itemsize > MAX_ID_BYTES:
        longest = max(sorted_ids, key=len)
        raise InvalidInput(f"id {longest.decode(errors='replace')!r}: {id_fault(longest)}")
    if len(sorted_ids) > 1 and not (sorted_ids[:-1] < sorted_ids[1:]).all():
        raise InvalidInput("ids of an id map must be sorted and distinct")
    np.save(path, sorted_ids, allow_pickle=False)


def open_ids(path: Path) -> IdMap:
    """Maps the id map at `path` into memory."""
    return IdMap(np.load(path, mmap_mode="r", allow_pickle=False))

"""Cuts an index into shards, each on a GPU of its own or on the CPU, and searches them as one.

A shard is an index of the same class over a range of the catalogue. The lists of all are merged by score, and
are then those of the whole index. Compressed kinds are not cut: they fit where whole vectors do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.index.found import Found, merge_found, nothing_found
from ensemble.index.main_index import MainIndex
from ensemble.index.vectors import Vectors

_PIECE = 1 << 18  # vectors copied at once

# (index of the shard's items, their vectors by the shard's rows, the shard's number) -> what searches it
Opener = Callable[[faiss.Index, Vectors, int], MainIndex]


class Shard(NamedTuple):
    """Holds the items behind row `start` of the catalogue: the shard's row r is the catalogue's start + r."""

    start: int
    searched: MainIndex


class ShardedIndex:
    """Searches like MainIndex."""

    def __init__(self, index: faiss.Index, vectors: Vectors, count: int, opened: Opener) -> None:
        """Cuts `index` into `count` ranges of about the same size."""
        self._whole = index  # the shards' quantizer is its
        self.num_items = int(index.ntotal)
        ends = np.linspace(0, self.num_items, min(count, self.num_items) + 1).astype(np.int64).tolist()
        self.shards = [
            Shard(start, opened(_part(index, start, end), _behind(vectors, start), number))
            for number, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        self._pool = ThreadPoolExecutor(len(self.shards), thread_name_prefix="shard")

    def search(self, query: Array, depth: int, mask: Array | None = None) -> Found:
        """Finds the best `depth` items for query [Q, D] float32 that pass `mask`, as MainIndex does."""
        if not len(query):
            return nothing_found(0, depth)
        return merge_found(
            list(self._pool.map(lambda shard: _search(shard, query, depth, mask), self.shards)), depth
        )


def _search(shard: Shard, query: Array, depth: int, mask: Array | None) -> Found:
    """Searches one shard; gives the catalogue's rows."""
    passing = None
    if mask is not None:
        passing = mask[shard.start : shard.start + shard.searched.num_items + 1].copy()
        passing[0] = False  # the shard's row 0 is nobody, the catalogue's row here is another shard's
    rows, scores = shard.searched.search(query, min(depth, shard.searched.num_items), passing)
    return np.where(rows > 0, rows + shard.start, -1), scores


def _behind(vectors: Vectors, start: int) -> Vectors:
    """Gives the vectors of a shard's rows."""
    return lambda rows: vectors(np.maximum(rows, 0) + start)


def _part(index: faiss.Index, start: int, end: int) -> faiss.Index:
    """Copies the items at positions `start` to `end` into an index of the same kind, numbered from 0."""
    if isinstance(index, faiss.IndexFlat):
        flat = faiss.IndexFlatIP(index.d)
        for first in range(start, end, _PIECE):
            flat.add(index.reconstruct_n(first, min(_PIECE, end - first)))
        return flat
    if not isinstance(index, faiss.IndexIVFFlat):
        raise ReleaseError(
            f"an index of kind {type(index).__name__} cannot be cut into shards",
            "serve it without --shards, or build with an --index-memory-mb that holds whole vectors",
        )
    part = faiss.IndexIVFFlat(index.quantizer, index.d, index.nlist, index.metric_type)
    part.is_trained = True
    index.copy_subset_to(part, 0, start, end)  # 0: a range of ids
    lists: Any = part.invlists
    for number in range(part.nlist):
        if size := lists.list_size(number):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            ids -= start
    return part

"""Searches item embeddings for whole batches, users with the same filter together.

Beside the main index, the items that were added or changed since it was built are searched exactly; both
lists are merged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ensemble.arrays import Array
from ensemble.engines import GPU, INDEX_VARIABLE
from ensemble.index.filters import RowMask
from ensemble.index.found import Found, merge_found
from ensemble.index.main_index import MainIndex, QuerySettings, open_index
from ensemble.index.vectors import Vectors, open_vectors
from ensemble.live.items import LiveState, LiveView, SearchedIndex
from ensemble.release.release import Release

# Half-precision or int8 vectors that a compressed index is refined with; absent where it needs none.
VECTORS = "vectors.npy"


def open_main(release: Release, query: QuerySettings, state: LiveState) -> MainIndex:
    """Opens the main index of one generation of a release, with the vectors that it is refined with."""
    path = (state.folder if state.generation else release.path) / "index.faiss"
    index = open_index(path, state.main_rows - 1, release.schema.sizes.embedding)
    vectors = _main_vectors(release, state)
    if os.environ.get(INDEX_VARIABLE) == GPU:
        from ensemble.index.gpu_index import GpuIndex

        return GpuIndex(index, vectors, query)
    return MainIndex(index, vectors, query)


def _main_vectors(release: Release, state: LiveState) -> Vectors:
    """Gives a reader of the main index's vectors, as they were merged into it.

    It holds arrays of the state and not the state, which holds the index: so a generation is freed as soon as
    nobody uses it.
    """
    embeddings, base = release.items["embedding"], lambda rows: embeddings[rows]
    num_base, slot_of_row, merged = state.num_base, state.slot_of_row, state.vectors[: state.delta_start]
    if (release.path / VECTORS).exists():
        release.verify_data(VECTORS)
        base = open_vectors(release.path / VECTORS, num_base, release.schema.sizes.embedding)
    if state.main_rows == num_base and not len(merged):
        return base

    def vectors(rows: Array) -> Array:
        slots, out = slot_of_row[rows], base(np.where(rows < num_base, rows, 0))
        # A row with a later slot is stale in this index: what it scores does not count.
        own = (slots > 0) & (slots <= len(merged))
        out[own] = merged[slots[own] - 1]
        return out

    return vectors


def search(view: LiveView, query: Array, depth: int, masks: Sequence[RowMask | None]) -> Array:
    """Finds the best items of each interest vector: query [B, M, D], masks [B] -> rows [B, M, depth] int64,
    best first, padded with -1. Users with the same mask are searched together."""
    num_users, interests, embedding = query.shape
    out = np.full((num_users, interests, depth), -1, np.int64)
    groups: dict[int, list[int]] = {}
    for user, mask in enumerate(masks):
        groups.setdefault(0 if mask is None else id(mask), []).append(user)
    for users in groups.values():
        flat = np.ascontiguousarray(query[users].reshape(-1, embedding))
        rows, _ = find(view, flat, depth, masks[users[0]])
        out[users] = rows.reshape(len(users), interests, depth)
    return out


def find(view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
    """Finds the best `depth` items of the main index and the delta together for query [Q, D] float32."""
    main = view.state.main
    assert main is not None, "recall attaches the index before the first search"
    if view.num_slots == view.state.delta_start and not view.num_stale:
        return main.search(query, depth, None if mask is None else mask.main)
    return merge_found(
        [_without_stale(main, view, query, depth, mask), _delta(view, query, depth, mask)], depth
    )


def _without_stale(
    main: SearchedIndex, view: LiveView, query: Array, depth: int, mask: RowMask | None
) -> Found:
    """Searches the main index without what was changed or deleted since: fetches more and drops those; where
    that leaves too few, searches again with a mask."""
    more = min(view.num_stale, max(32, depth // 4))
    rows, scores = main.search(query, depth + more, None if mask is None else mask.main)
    stale = (rows > 0) & ~view.fresh[rows]
    rows, scores = np.where(stale, -1, rows), np.where(stale, -np.inf, scores)
    short = np.flatnonzero(stale.sum(axis=1) > more)
    if len(short):
        rows[short], scores[short] = main.search(
            query[short], depth + more, view.fresh if mask is None else view.fresh & mask.main
        )
    return rows, scores


def _delta(view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
    """Searches the delta's slots exactly; gives the best in any order."""
    rows, hidden = view.state.slot_rows[view.delta], view.superseded
    scores = query @ view.state.vectors[view.delta].T
    scores[:, hidden if mask is None else hidden | ~mask.slots] = -np.inf
    if len(rows) > depth:
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        chosen = np.take_along_axis(scores, best, axis=1)
        least = chosen.min(axis=1, keepdims=True)
        tied = ((scores >= least).sum(axis=1, keepdims=True) > depth) & ~np.isneginf(least)
        if not tied.any():  # else the order of rows decides who stays
            rows, scores = rows[best], chosen
    return np.where(np.isneginf(scores), -1, rows), scores

"""Searches item embeddings for whole batches, users with the same filter together.

Beside the main index, what was added or changed since it was built is searched: segments with an index each,
and the tail behind them exactly; the lists are merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.engines import GPU, INDEX_VARIABLE, SHARDS_VARIABLE
from ensemble.index.filters import RowMask
from ensemble.index.found import Found, last_bits, merge_found
from ensemble.index.main_index import MainIndex, QuerySettings, open_index
from ensemble.index.sharded import ShardedIndex
from ensemble.index.vectors import Vectors, open_vectors
from ensemble.live.segment import SearchedIndex, Segment
from ensemble.live.state import LiveView
from ensemble.release.release import Release

# Half-precision or int8 vectors that a compressed index is refined with; absent where it needs none.
VECTORS = "vectors.npy"


def open_main(release: Release, query: QuerySettings) -> SearchedIndex:
    """Opens a release's index, whole or in shards, with the vectors that it is refined with."""
    index = open_index(release.path / "index.faiss", len(release.items) - 1, release.schema.sizes.embedding)
    embeddings = release.items["embedding"]
    vectors: Vectors = lambda rows: embeddings[rows]  # noqa: E731
    if (release.path / VECTORS).exists():
        release.verify_data(VECTORS)
        vectors = open_vectors(release.path / VECTORS, len(release.items), release.schema.sizes.embedding)
    shards = int(os.environ.get(SHARDS_VARIABLE, "1"))
    if shards > 1:
        return ShardedIndex(index, vectors, shards, partial(_opened, query))
    return _opened(query, index, vectors)


def _opened(query: QuerySettings, index: faiss.Index, vectors: Vectors, shard: int = 0) -> MainIndex:
    """Opens an index, or one shard of it, where the server wants it searched: shards take the GPUs by
    turns."""
    if os.environ.get(INDEX_VARIABLE) == GPU:
        from ensemble.index.gpu_index import Device, GpuIndex, num_gpus

        return GpuIndex(index, vectors, query, Device(shard % num_gpus()))
    return MainIndex(index, vectors, query)


def open_segment_index(release: Release, query: QuerySettings, segment: Segment) -> MainIndex:
    """Opens a segment's index; always on the CPU, for segments come and go."""
    index = open_index(segment.index_file, len(segment), release.schema.sizes.embedding)
    embeddings = segment.part.items["embedding"]
    return MainIndex(index, lambda positions: embeddings[positions - 1], query)


def search(view: LiveView, query: Array, depths: Array, masks: Sequence[RowMask | None]) -> Array:
    """Finds the best items of each interest vector: query [B, M, D], depths [B], masks [B] -> rows [B, M,
    deepest] int64, best first, padded with -1.

    Users with the same mask and depth are searched together, and how deep is each one's own matter: an
    approximate index would find others for whoever has a batch-mate that needs more.
    """
    return search_groups(partial(find, view), query, depths, masks)


def search_groups(
    find: Callable[[Array, int, RowMask | None], Found],
    query: Array,
    depths: Array,
    masks: Sequence[RowMask | None],
) -> Array:
    """Does search() with anything that finds the best `depth` rows [Q, depth] for query [Q, D] under a
    mask."""
    num_users, interests, embedding = query.shape
    out = np.full((num_users, interests, int(depths.max(initial=0))), -1, np.int64)
    groups: dict[tuple[int, int], list[int]] = {}
    for user, (mask, depth) in enumerate(zip(masks, depths.tolist(), strict=True)):
        groups.setdefault((0 if mask is None else id(mask), depth), []).append(user)
    for (_, depth), users in groups.items():
        flat = np.ascontiguousarray(query[users].reshape(-1, embedding))
        rows, _ = find(flat, depth, masks[users[0]])
        out[users, :, :depth] = rows.reshape(len(users), interests, depth)
    return out


def find(view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
    """Finds the best `depth` items of the main index, the segments and the tail together for query [Q, D]
    float32."""
    main = view.state.main
    assert main is not None, "recall attaches the index before the first search"
    if not view.num_slots and not view.num_stale:
        return main.search(query, depth, None if mask is None else mask.main)
    parts = [of_main(main, view, query, depth, mask)]
    for place, (segment, start) in enumerate(view.state.placed()):
        passing = None if mask is None else mask.segments[place]
        if len(segment):
            parts.append(_of_segment(segment, start, view, query, depth, passing))
    parts.append(_of_tail(view, query, depth, mask))
    return merge_found(parts, depth)


def of_main(main: SearchedIndex, view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
    """Searches the main index without what was changed or deleted since."""
    passing = None if mask is None else mask.main
    return _without_stale(
        main,
        query,
        depth,
        passing,
        min(view.num_stale, max(32, depth // 4)),
        view.is_stale,
        lambda: view.fresh if passing is None else view.fresh & passing,
    )


def _of_segment(
    segment: Segment, start: int, view: LiveView, query: Array, depth: int, passing: Array | None
) -> Found:
    """Searches a segment without what was changed or deleted since it was sealed; `passing` [n] bool."""
    assert segment.index is not None
    rows_of = segment.part.rows
    mask = None if passing is None else np.concatenate([[False], passing])

    def is_stale(positions: Array) -> Array:
        return ~view.is_current(rows_of[positions - 1], start + positions - 1)

    def current() -> Array:
        fresh = np.concatenate([[False], ~is_stale(np.arange(1, len(segment) + 1))])
        return fresh if mask is None else fresh & mask

    more = min(len(segment), max(32, depth // 4))
    positions, scores = _without_stale(segment.index, query, depth, mask, more, is_stale, current)
    return np.where(positions > 0, rows_of[np.maximum(positions, 1) - 1], -1), scores


def _without_stale(
    index: SearchedIndex,
    query: Array,
    depth: int,
    mask: Array | None,
    more: int,
    is_stale: Callable[[Array], Array],
    current: Callable[[], Array],
) -> Found:
    """Searches an index for `more` than wanted, and drops what it has with old content; where that leaves too
    few, searches again with a mask of what is `current`."""
    found, scores = index.search(query, depth + more, mask)
    here = found > 0
    stale = np.zeros(found.shape, bool)
    stale[here] = is_stale(found[here])
    found, scores = np.where(stale, -1, found), np.where(stale, -np.inf, scores)
    short = np.flatnonzero(stale.sum(axis=1) > more)
    if len(short):
        found[short], scores[short] = index.search(query[short], depth + more, current())
    return found, scores


def _of_tail(view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
    """Searches the tail's slots exactly; gives the best in any order."""
    rows, hidden = view.state.slot_rows[view.tail], view.superseded
    scores = query @ view.state.slots["embedding"][view.tail].T
    scores[:, hidden if mask is None else hidden | ~mask.tail] = -np.inf
    return best_of(rows, scores, depth)


def best_of(rows: Array, scores: Array, depth: int) -> Found:
    """Gives about the best `depth` of rows [n] by scores [Q, n], -inf where one must not come; in any order,
    with all that is as good as the last."""
    if len(rows) > depth:
        best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        chosen = np.take_along_axis(scores, best, axis=1)
        least = chosen.min(axis=1, keepdims=True)
        as_good = scores >= least - last_bits(least)
        tied = (as_good.sum(axis=1, keepdims=True) > depth) & ~np.isneginf(least)
        if not tied.any():  # else the order of rows decides who stays
            rows, scores = rows[best], chosen
    return np.where(np.isneginf(scores), -1, rows), scores

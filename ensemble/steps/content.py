"""Offers what is like the user's last items: a source that needs nobody to have taken an item before.

An item's content vector is the sum of what its categories and words weigh, made of length 1; its weights are
the inverse document frequencies, in the leading directions of the catalogue (latent semantic indexing:
Deerwester et al., JASIS 1990; builders/index/content.py). A user's query is the mean of the last items'
vectors, so a score is a mean cosine. Items that are added or changed live get their vectors from their codes,
by the same table.

Axes: B batch, W seen, K last items, N candidates, Q queries, C code columns, E components.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.index.filters import RowMask
from ensemble.index.found import Found, merge_found
from ensemble.index.item_index import best_of, of_main, search_groups
from ensemble.index.main_index import MainIndex, QuerySettings, open_index
from ensemble.live.state import LiveState, LiveView
from ensemble.steps.recall_settings import RecallSettings
from ensemble.steps.served import ServedRelease
from ensemble.steps.sources import Batch

TABLE, VECTORS, INDEX = "content_codes.npy", "content.npy", "content.faiss"
_PIECE = 1 << 14  # items whose codes are summed at once


def content_vectors(table: Array, codes: Array) -> Array:
    """Makes content vectors [n, E] float32 of length 1 of items with codes [n, C], by what each code weighs,
    table [codes, E] float32; 0 for an item of which nothing is known."""
    out = np.empty((len(codes), table.shape[1]), np.float32)
    for start in range(0, len(codes), _PIECE):
        piece = np.asarray(codes[start : start + _PIECE])
        known = np.where(piece < len(table), piece, 0)  # what is new in the vocabulary says nothing yet
        vectors = np.zeros((len(piece), table.shape[1]), np.float32)
        for column in known.T:
            vectors += table[column]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        out[start : start + _PIECE] = vectors / np.maximum(lengths, 1e-9)
    return out


class Content:
    """Offers the items whose content is nearest to that of the user's last items."""

    name, fills_up = "content", False

    def __init__(self, release: ServedRelease, settings: RecallSettings) -> None:
        release.verify_data(TABLE, VECTORS, INDEX)
        self._table = np.load(release.path / TABLE, mmap_mode="r", allow_pickle=False)
        # [I + 1, E] float16, by row
        self.vectors = np.load(release.path / VECTORS, mmap_mode="r", allow_pickle=False)
        index = open_index(release.path / INDEX, len(self.vectors) - 1, self.vectors.shape[1])
        query = QuerySettings(settings.content_nprobe, settings.content_refine_factor)
        self._index = MainIndex(index, lambda rows: self.vectors[rows].astype(np.float32), query)
        self._num_last, self._wanted = settings.content_items, settings.quotas.get(self.name, 0)
        self._candidates = release.schema.sizes.candidates
        self._live: tuple[LiveState | None, Array] = None, np.zeros((0, 0), np.float32)

    def offer(self, batch: Batch) -> Array:
        """Gives rows [B, deepest]: as many as its quota, and as many more as the user excludes."""
        query = self.query(batch)
        depths = np.maximum(batch.depths - self._candidates + self._wanted, 1)

        def find(asked: Array, depth: int, mask: RowMask | None) -> Found:
            return self._find(batch.view, asked, depth, mask)

        rows = search_groups(find, query[:, None], depths, batch.masks)[:, 0]
        return np.where(query.any(axis=1)[:, None], rows, -1)

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives the mean cosine with the user's last items [B, N]; 0 where nothing is known of either."""
        return np.matmul(self._of_rows(batch.view, rows), self.query(batch)[:, :, None])[..., 0]

    def query(self, batch: Batch) -> Array:
        """Gives the mean of the last items' vectors [B, E], computed once a batch; 0 without a past."""
        if self.name not in batch.lists:
            last = batch.seen_rows[:, -self._num_last :]
            total = self._of_rows(batch.view, last).sum(axis=1)
            mean = total / np.maximum((last > 0).sum(axis=1, keepdims=True), 1)
            batch.lists[self.name] = mean.astype(np.float32), last
        return batch.lists[self.name][0]

    def _of_rows(self, view: LiveView, rows: Array) -> Array:
        """Gives the content vectors of rows [B, N] as they are now: [B, N, E] float32, 0 where padded."""
        own, slots = (np.maximum(rows, 0), np.zeros(0)) if view.is_as_built else view.split(rows)
        vectors = self.vectors[np.maximum(own, 0)].astype(np.float32)
        if slots.any():
            here = slots > 0
            vectors[here] = self._of_slots(view)[slots[here] - 1]
        return vectors

    def _of_slots(self, view: LiveView) -> Array:
        """Gives the content vectors [at least num_slots, E] of what was added or changed, each computed once
        as long as nothing is merged."""
        state, vectors = self._live
        if state is not view.state:
            state, vectors = view.state, np.zeros((0, self._table.shape[1]), np.float32)
        if len(vectors) < view.num_slots:
            codes = state.content(np.arange(len(vectors), view.num_slots), "codes")
            vectors = np.concatenate([vectors, content_vectors(self._table, codes)])
            self._live = state, vectors
        return vectors

    def _find(self, view: LiveView, query: Array, depth: int, mask: RowMask | None) -> Found:
        """Finds the best `depth` items, the release's own and live ones, for query [Q, E]."""
        if not view.num_slots and not view.num_stale:
            return self._index.search(query, depth, None if mask is None else mask.main)
        parts = [of_main(self._index, view, query, depth, mask)]
        state, slots = view.state, np.arange(view.num_slots)
        starts = [part.part.rows for part, _ in state.placed()]
        rows = np.concatenate([*starts, state.slot_rows[view.tail]])
        scores = query @ self._of_slots(view)[: view.num_slots].T
        shown = view.is_current(rows, slots) & (True if mask is None else mask.passes(rows))
        scores[:, ~shown] = -np.inf
        parts.append(best_of(rows, scores, depth))
        return merge_found(parts, depth)

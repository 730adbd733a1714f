"""Compares a query's vector with what the catalogue's items say and show: exactly, for every row.

An item's row holds the leading components of its text's or picture's vector (ensemble/content/projection.py);
a query is projected alike, and a score is the cosine of the two. What was added or changed while it is served
lies in the overlay's slots, and its scores stand over those of the release's own row.

Where a release has heads of a space that titles and pictures share (ensemble/content/shared_space.py), a
feature's items have a second vector each, in that space: what the other feature's query is compared with.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.content.projection import Projection
from ensemble.content.shared_space import Head
from ensemble.live.state import LiveState, LiveView
from ensemble.schema import Feature

_PIECE = 1 << 15  # rows at once


def vectors_file(feature: str) -> str:
    """Names the file of a feature's vectors."""
    return f"search_{feature}.npy"


def shared_file(feature: str) -> str:
    """Names the file of a feature's vectors in the shared space."""
    return f"shared_{feature}.npy"


def unit_rows(values: Array) -> Array:
    """Makes components [n, P + 1] of rows vectors [n, P] float32 of length 1; 0 where the last column says
    that there is nothing."""
    kept = np.ascontiguousarray(values[:, :-1], np.float32) * (values[:, -1:] == 0)
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-9)


def _placed(values: Array, head: Head | None) -> Array:
    """Makes components [n, P + 1] of rows vectors of length 1: [n, P], or [n, D] in the shared space."""
    rows = unit_rows(values)
    return rows if head is None else head.unit(rows)


def query_rows(projection: Projection, vectors: Array) -> Array:
    """Projects vectors [B, V] of queries: [B, P] of length 1, 0 where there is none."""
    return unit_rows(projection.values(vectors, vectors.any(axis=1)))


def write_vectors(feature: Feature, values: Array, folder: Path, head: Head | None = None) -> None:
    """Writes the vectors of all rows, values [I + 1, *] being the packed ones; with a head those in the
    shared space."""
    name, width = vectors_file(feature.name), feature.width - 1
    if head is not None:
        name, width = shared_file(feature.name), len(head.bias)
    out = np.lib.format.open_memmap(folder / name, "w+", np.float32, (len(values), width))
    for start in range(0, len(values), _PIECE):
        out[start : start + _PIECE] = _placed(values[start : start + _PIECE, feature.columns], head)
    out[:1] = 0
    out.flush()


class Looks:
    """Holds one feature's vectors, mapped, and those of the slots; with a head those in the shared space."""

    def __init__(self, feature: Feature, folder: Path, head: Head | None = None) -> None:
        self.feature, self._head = feature, head
        path = folder / (vectors_file(feature.name) if head is None else shared_file(feature.name))
        self.own = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        self._live: tuple[LiveState | None, Array] = None, self.own[:0]

    def of_rows(self, view: LiveView, rows: Array) -> Array:
        """Gives the vectors [n, P] of items at rows [n] as they are now."""
        own, slots = view.split(rows)
        out = self.own[np.maximum(own, 0)] * (own > 0)[:, None]
        here = slots > 0
        if here.any():
            out[here] = self._of_slots(view)[slots[here] - 1]
        return out

    def scores(self, view: LiveView, query: Array) -> Array:
        """Gives the cosine of queries [Q, P] with every item: [Q, num_rows] float32."""
        out = np.zeros((len(query), view.num_rows), np.float32)
        np.matmul(query, self.own.T, out=out[:, : len(self.own)])
        if view.num_slots:
            slots, state = np.arange(view.num_slots), view.state
            starts = [part.part.rows for part, _ in state.placed()]
            rows = np.concatenate([*starts, state.slot_rows[view.tail]])
            current = np.flatnonzero(view.is_current(rows, slots))
            out[:, rows[current]] = query @ self._of_slots(view)[current].T
        return out

    def _of_slots(self, view: LiveView) -> Array:
        """Gives the vectors [at least num_slots, P] of what was added or changed, each computed once as long
        as nothing is merged."""
        state, vectors = self._live
        if state is not view.state:
            state, vectors = view.state, self.own[:0]
        if len(vectors) < view.num_slots:
            values = state.content(np.arange(len(vectors), view.num_slots), "values")
            vectors = np.concatenate([vectors, _placed(values[:, self.feature.columns], self._head)])
            self._live = state, vectors
        return vectors

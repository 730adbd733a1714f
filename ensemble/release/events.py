"""Tells what the events of a past add to their items, by kind and by the time since the event before: a
purchase says something else than a view, and the first view of a visit something else than its tenth.

An event's kind and gap name its cell, a row of `history_events_embedding.npy` [(E + 1) * GAPS, D] float32,
which the `features` step adds to history_embeddings, and of `history_events_features.npy`, likewise
[…, F], for history_features. The cells of kind 0, which is padding, are 0. The user encoder and the ranker
learn them (builders/events.py).

Axes: B batch, W events of a past, H history, D embedding, F item features, E kinds of events.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.release.release import Release
from ensemble.schema import Schema

FIELDS = ("embedding", "features")  # of an item's row: what the user encoder sees, and what the ranker does
FIRST = 27  # the gap of an event before which none is known
GAPS = FIRST + 1  # gap g: at least 2^g - 1 seconds; the longest are more than two years


def event_cells(schema: Schema, times: Array, kinds: Array) -> Array:
    """Gives the cell of each event of pasts, in order of time: times [B, W] int64 Unix seconds, kinds [B, W]
    (0 where padded) -> [B, W] int64. Without a clock, where times are no times, only the first is told from
    the others."""
    gaps = np.full(kinds.shape, FIRST, np.int64)
    after = kinds[:, :-1] > 0
    if schema.has_clock:
        seconds = np.maximum(np.diff(times, axis=1), 0)
        lasting = np.minimum(np.log2(1 + seconds), FIRST - 1).astype(np.int64)
    else:
        lasting = np.zeros_like(gaps[:, 1:])
    np.copyto(gaps[:, 1:], lasting, where=after)
    return kinds.astype(np.int64) * GAPS + gaps


class HistoryEvents:
    """Opens what a release's events add; where it has no such file, they add nothing."""

    def __init__(self, release: Release) -> None:
        self._tables = {}
        for field in FIELDS:
            path = events_file(release.path, field)
            if path.exists():
                release.verify([path])
                self._tables[field] = np.load(path, allow_pickle=False)

    @property
    def known(self) -> bool:
        """Says whether events add anything."""
        return bool(self._tables)

    def added(self, field: str, rows: Array, cells: Array) -> Array:
        """Gives rows [B, H, D or F] float32 of a history's items, a field of theirs, with what the events in
        cells [B, H] add."""
        table = self._tables.get(field)
        return rows if table is None else rows + table[cells]


def events_file(folder: Path, field: str) -> Path:
    """Names the file of a release that holds what events add to a field of items' rows."""
    return folder / f"history_events_{field}.npy"

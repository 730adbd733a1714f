"""Tells what the events of a past add to their items, by kind and age: a purchase of long ago says something
else than a view of just now. The ranker learns it, the `features` step adds it to history_features.

An event's age is the time from it to the user's newest event, in steps that double: what belonged to one
visit stays together, however long ago that visit was. Its kind and age name its cell, a row of
`history_events.npy` [(E + 1) * AGES, F] float32. The cells of kind 0, which is padding, are 0.

Axes: B batch, H history, F item features, E kinds of events. Training and serving count cells here.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.release.release import Release
from ensemble.schema import Schema

HISTORY_EVENTS = "history_events.npy"
AGES = 28  # steps of an age: 0 is less than a second, the last one more than four years


def num_cells(schema: Schema) -> int:
    """Counts the cells of a shop, those of padding first."""
    return (len(schema.events) + 1) * AGES


def event_cells(schema: Schema, times: Array, kinds: Array) -> Array:
    """Gives the cell of each event of pasts: times [B, H] int64 Unix seconds, newest last, kinds [B, H] (0
    where padded) -> [B, H] int64. Without a clock, where times are no times, all are of age 0."""
    cells = kinds.astype(np.int64) * AGES
    if not schema.has_clock:
        return cells
    gaps = np.maximum(times[:, -1:] - times, 0)
    return cells + np.minimum(np.log2(1 + gaps), AGES - 1).astype(np.int64)


class HistoryEvents:
    """Opens what a release's events add; of one that has no such file they add nothing."""

    def __init__(self, release: Release) -> None:
        self._table: Array | None = None
        path = release.path / HISTORY_EVENTS
        if path.exists():
            release.verify_data(HISTORY_EVENTS)
            self._table = np.load(path, allow_pickle=False)

    @property
    def known(self) -> bool:
        """Says whether events add anything."""
        return self._table is not None

    def added(self, features: Array, cells: Array) -> Array:
        """Gives features [B, H, F] float32 of a history's items with what the events in cells [B, H] add."""
        return features if self._table is None else features + self._table[cells]

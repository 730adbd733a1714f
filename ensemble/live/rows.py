"""Rows of items as steps read them: what the log has changed from the log, everything else through the tiers.

The log wins over Redis: recall searches and filters by the log's content, and two writers of one row would
have no order between them. So the tiers are never asked for an item that was added or changed live.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.live.items import LiveView
from ensemble.tiers.reader import RowReader, Rows


@dataclass(frozen=True)
class LiveRows:
    """tiers.reader.Rows with the log's content over them."""

    rows: Rows
    view: LiveView
    slots: np.ndarray  # [...] int64: slot + 1, 0 where the tiers' row counts

    def field(self, name: str) -> np.ndarray:
        """[..., width] contiguous; 0 where padded."""
        return self.view.put_slots(self.rows.field(name), self.slots, name)

    def at(self, *places: np.ndarray) -> LiveRows:
        """Some of them, in another order."""
        return LiveRows(self.rows.at(*places), self.view, self.slots[places])

    def status_of_users(self) -> np.ndarray | int:
        """[B] int64: each line's bits together; the log's rows are never stale."""
        return self.rows.status_of_users()


def read_items(reader: RowReader, view: LiveView, rows: np.ndarray) -> Rows | LiveRows:
    """rows [...] int64, -1 or 0 where padded."""
    if not view.num_slots:
        return reader.read_items(rows)
    own, slots = view.split(rows)
    return LiveRows(reader.read_items(own), view, slots)

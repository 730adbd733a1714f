"""Reads rows of items for steps: what the log has changed from the log, all else through the tiers.

The log wins over Redis: recall searches and filters by the log's content, and two writers of one row would
have no order between them. So the tiers are never asked for an item that was added or changed live.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.arrays import Array
from ensemble.live.state import LiveView
from ensemble.tiers.reader import RowReader, Rows


@dataclass(frozen=True)
class LiveRows:
    """Holds tiers.reader.Rows with the log's content over them."""

    rows: Rows
    view: LiveView
    slots: Array  # [...] int64: slot + 1, 0 where the tiers' row counts

    def field(self, name: str) -> Array:
        """Gives a field of the rows: [..., width] contiguous; 0 where padded."""
        return self.view.put_slots(self.rows.field(name), self.slots, name)

    def at(self, *places: Array) -> LiveRows:
        """Picks some of the rows, in another order."""
        return LiveRows(self.rows.at(*places), self.view, self.slots[places])

    def status_of_users(self) -> Array | int:
        """Joins each user's bits: [B] int64, or 0; the log's rows are never stale."""
        return self.rows.status_of_users()


def read_items(reader: RowReader, view: LiveView, rows: Array) -> Rows | LiveRows:
    """Reads the items at rows [...] int64; -1 or 0 where padded."""
    if view.is_as_built:
        return reader.read_items(rows)
    own, slots = view.split(rows)
    return LiveRows(reader.read_items(own), view, slots)

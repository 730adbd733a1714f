"""Step 1, features: tells who is asking. user_id -> the user's past, features and status."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ensemble.activity import activity, recencies
from ensemble.arrays import Array, Tensors, ranks_within
from ensemble.context import context_state
from ensemble.contract import Degraded
from ensemble.live.rows import read_items
from ensemble.live.state import LiveView
from ensemble.options import Options
from ensemble.release.events import FIELDS, HistoryEvents, event_cells
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease


@dataclass(frozen=True)
class Past:
    """Holds what users did, oldest first, left-padded: item rows [B, W] int64 (-1 where padded), Unix seconds
    or positions [B, W] int64, and kinds [B, W] int32 (contract.py); 0 where padded."""

    rows: Array
    times: Array
    kinds: Array

    def pads_first(self) -> Past:
        """Moves the padding to the front and keeps the rest in its order."""
        order = np.argsort(self.rows >= 0, axis=1, kind="stable")
        return Past(*(np.take_along_axis(one, order, axis=1) for one in (self.rows, self.times, self.kinds)))

    def without(self, gone: Array) -> Past:
        """Leaves out the events where gone [B, W] bool is true."""
        parts = ((self.rows, -1), (self.times, 0), (self.kinds, 0))
        return Past(*(np.where(gone, pad, one) for one, pad in parts)).pads_first()


class FeatureLookup:
    """Reads the rows of a whole batch through the tiers. Without Redis they come from the release's snapshot,
    with one binary search and one gather a field."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("user_ids.npy", "users.npy", "item_ids.npy", "items.npy")
        self.user_ids, self.users = release.user_ids, release.users
        self.live, self.events = release.live, HistoryEvents(release)
        self.user_reader, self.item_reader = release.readers.users, release.readers.items
        self.schema, self.history = release.schema, release.schema.sizes.history

    def run(self, options: Options, *, user_id: Array) -> Tensors:
        """Looks users up: user_id [B, 1] bytes -> seen_* [B, W], history_* [B, H…], user_* (contract)."""
        view = self.live.refresh()
        user_rows = self.user_ids.rows_from_ids(user_id[:, 0])
        users = self.user_reader.read_users(user_id[:, 0], user_rows)
        # A tier may know users that came after the release.
        known = user_rows > 0 if users.known is None else users.known
        status = np.where(known, 0, Degraded.UNKNOWN_USER).astype(np.int64) | users.status_of_users()
        now = np.floor(options.times(time.time()))  # as the times of a past: whole seconds
        stored = Past(
            users.field("seen").astype(np.int64),
            users.field("seen_times").astype(np.int64),
            users.field("seen_kinds").astype(np.int32),
        )
        status[~options.knows_context] |= Degraded.UNKNOWN_CONTEXT
        contexts = options.contexts(len(self.schema.context))
        past = self._with_session(_without_later(stored, view, status), options, now, status, view)
        return {
            **self.past_tensors(past, now, users.field("rates"), contexts),
            **self.history_of(past, view, status),
            "user_codes": users.field("codes"),
            "user_values": users.field("values"),
            "user_features": users.field("features"),
            "user_status": status[:, None],
        }

    def past_tensors(self, past: Past, now: Array, rates: Array, contexts: Array | None = None) -> Tensors:
        """Gives seen_* [B, W] and user_state [B, A] of pasts at `now` [B] Unix seconds; rates [B, user_rates]
        float32 are the users' own, contexts [B, X] those of their requests (NaN: absent)."""
        if contexts is None:
            contexts = np.full((len(now), len(self.schema.context)), np.nan, np.float32)
        seen_recencies = recencies(self.schema, past.times, past.kinds, now)
        state = activity(self.schema, seen_recencies, past.kinds)
        return {
            "seen_rows": past.rows,
            "seen_kinds": past.kinds,
            "seen_recencies": seen_recencies,
            "user_state": np.concatenate([state, context_state(self.schema, contexts), rates], axis=1),
        }

    def history_of(self, past: Past, view: LiveView | None = None, status: Array | None = None) -> Tensors:
        """Gives of the last H events of pasts the mask [B, H], embeddings [B, H, D] and features [B, H, F] of
        their items, with what the events add; notes in `status` [B] what is stale."""
        history = past.rows[:, -self.history :]
        items = read_items(self.item_reader, view or self.live.view, history)
        if status is not None:
            status |= items.status_of_users()
        seen = {field: items.field(field) for field in FIELDS}
        if self.events.known:
            cells = self.cells(past)
            seen = {field: self.events.added(field, rows, cells) for field, rows in seen.items()}
        return {
            "history_mask": history >= 0,
            "history_embeddings": seen["embedding"],
            "history_features": seen["features"],
        }

    def cells(self, past: Past) -> Array:
        """Gives the cells of the last H events of pasts [B, H] int64 (ensemble/release/events.py)."""
        known = slice(-self.history - 1, None)  # and the one before, from which the first of them is told
        return event_cells(self.schema, past.times[:, known], past.kinds[:, known])[:, -self.history :]

    def _with_session(self, past: Past, options: Options, now: Array, status: Array, view: LiveView) -> Past:
        """Puts the session's items behind the stored past, as events of the first kind at `now` [B]; drops
        unknown ones and notes them in `status`, in place."""
        owners, ids = options.ids("session_items")
        if not len(owners):
            return past
        item_rows = view.rows_from_ids(ids)
        status[owners[item_rows == 0]] |= Degraded.UNKNOWN_ITEMS
        owners, item_rows = owners[item_rows > 0], item_rows[item_rows > 0]
        num_users, width = past.rows.shape
        session = Past(
            np.full((num_users, width), -1, np.int64),
            np.zeros((num_users, width), np.int64),
            np.zeros((num_users, width), np.int32),
        )
        # A place is counted from the end: -1 is the newest.
        place = ranks_within(owners) - np.bincount(owners, minlength=num_users)[owners]
        kept = place >= -width
        at = owners[kept], place[kept]
        session.rows[at], session.times[at], session.kinds[at] = item_rows[kept], now[owners[kept]], 1
        both = ((past.rows, session.rows), (past.times, session.times), (past.kinds, session.kinds))
        joined = Past(*(np.concatenate(pair, axis=1) for pair in both)).pads_first()
        return Past(joined.rows[:, -width:], joined.times[:, -width:], joined.kinds[:, -width:])


def _without_later(past: Past, view: LiveView, status: Array) -> Past:
    """Takes from a past the items that this process does not know, and notes them in `status` [B]: it may
    come from a later log than ours."""
    later = past.rows >= view.num_rows
    if not later.any():
        return past
    status[later.any(axis=1)] |= Degraded.UNKNOWN_ITEMS
    return past.without(later)

"""Step 1, features: tells who is asking. user_id -> the user's past, features and status."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array, Tensors, ranks_within
from ensemble.contract import Degraded
from ensemble.live.rows import read_items
from ensemble.live.state import LiveView
from ensemble.options import Options
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease


class FeatureLookup:
    """Reads the rows of a whole batch through the tiers. Without Redis they come from the release's snapshot,
    with one binary search and one gather a field."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("user_ids.npy", "users.npy", "item_ids.npy", "items.npy")
        self.user_ids, self.users = release.user_ids, release.users
        self.live = release.live
        self.user_reader, self.item_reader = release.readers.users, release.readers.items
        self.history = release.schema.sizes.history

    def run(self, options: Options, *, user_id: Array) -> Tensors:
        """Looks users up: user_id [B, 1] bytes -> seen_rows [B, W], history_* [B, H…], user_* (contract)."""
        view = self.live.refresh()
        user_rows = self.user_ids.rows_from_ids(user_id[:, 0])
        users = self.user_reader.read_users(user_id[:, 0], user_rows)
        # A tier may know users that came after the release.
        known = user_rows > 0 if users.known is None else users.known
        status = np.where(known, 0, Degraded.UNKNOWN_USER).astype(np.int64) | users.status_of_users()
        stored = _without_later(users.field("seen").astype(np.int64), view, status)
        seen_rows = self._with_session(stored, options, status, view)
        history = self.history_from_seen(seen_rows, view, status)
        return {
            **history,
            "user_codes": users.field("codes"),
            "user_values": users.field("values"),
            "user_features": users.field("features"),
            "user_status": status[:, None],
        }

    def history_from_seen(
        self, seen_rows: Array, view: LiveView | None = None, status: Array | None = None
    ) -> Tensors:
        """Gives seen_rows [B, W] int64, and of its last H the mask [B, H], embeddings [B, H, D] and features
        [B, H, F]; notes in `status` [B] what is stale."""
        history = seen_rows[:, -self.history :]
        items = read_items(self.item_reader, view or self.live.view, history)
        if status is not None:
            status |= items.status_of_users()
        return {
            "seen_rows": seen_rows,
            "history_mask": history >= 0,
            "history_embeddings": items.field("embedding"),
            "history_features": items.field("features"),
        }

    def _with_session(self, seen_rows: Array, options: Options, status: Array, view: LiveView) -> Array:
        """Puts the session's items behind the stored past; drops unknown ones and notes them in `status`, in
        place."""
        owners, ids = options.ids("session_items")
        if not len(owners):
            return seen_rows
        item_rows = view.rows_from_ids(ids)
        status[owners[item_rows == 0]] |= Degraded.UNKNOWN_ITEMS
        owners, item_rows = owners[item_rows > 0], item_rows[item_rows > 0]
        width = seen_rows.shape[1]
        session = np.full((len(seen_rows), width), -1, np.int64)
        # A place is counted from the end: -1 is the newest.
        place = ranks_within(owners) - np.bincount(owners, minlength=len(seen_rows))[owners]
        kept = place >= -width
        session[owners[kept], place[kept]] = item_rows[kept]
        return _pads_first(np.concatenate([seen_rows, session], axis=1))[:, -width:]


def _without_later(seen_rows: Array, view: LiveView, status: Array) -> Array:
    """Takes from seen_rows [B, W] the items that this process does not know, and notes them in `status`: a
    past may come from a later log than ours."""
    later = seen_rows >= view.num_rows
    if not later.any():
        return seen_rows
    status[later.any(axis=1)] |= Degraded.UNKNOWN_ITEMS
    return _pads_first(np.where(later, -1, seen_rows))


def _pads_first(rows: Array) -> Array:
    """Moves the padding, -1, to the front of rows [B, W] and keeps the rest in its order."""
    return np.take_along_axis(rows, np.argsort(rows >= 0, axis=1, kind="stable"), axis=1)

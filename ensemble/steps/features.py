"""Step 1, features: who is asking? user_id -> the user's past, features and status."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Tensors, ranks_within
from ensemble.contract import Degraded
from ensemble.live.items import LiveView
from ensemble.live.rows import read_items
from ensemble.options import Options
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease


class FeatureLookup:
    """Reads the rows of a whole batch through the tiers; without Redis from the release's snapshot: one
    binary search, one gather a field."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("user_ids.npy", "users.npy", "item_ids.npy", "items.npy")
        self.user_ids, self.users = release.user_ids, release.users
        self.live = release.live
        self.user_reader, self.item_reader = release.readers.users, release.readers.items
        self.history = release.schema.sizes.history

    def run(self, options: Options, *, user_id: np.ndarray) -> Tensors:
        """user_id [B, 1] bytes -> seen_rows [B, W], history_* [B, H…], user_* (contract.py)."""
        view = self.live.refresh()
        user_rows = self.user_ids.rows_from_ids(user_id[:, 0])
        users = self.user_reader.read_users(user_id[:, 0], user_rows)
        # a tier may know users that came after the release
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
        self, seen_rows: np.ndarray, view: LiveView | None = None, status: np.ndarray | None = None
    ) -> Tensors:
        """seen_rows [B, W] int64 -> it, and the mask [B, H], embeddings [B, H, D] and features [B, H, F] of
        its last H; notes in `status` what is stale."""
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

    def _with_session(
        self, seen_rows: np.ndarray, options: Options, status: np.ndarray, view: LiveView
    ) -> np.ndarray:
        """Puts the session's items behind the stored past; unknown ones are dropped and noted in `status`, in
        place."""
        owners, ids = options.ids("session_items")
        if not len(owners):
            return seen_rows
        item_rows = view.rows_from_ids(ids)
        status[owners[item_rows == 0]] |= Degraded.UNKNOWN_ITEMS
        owners, item_rows = owners[item_rows > 0], item_rows[item_rows > 0]
        width = seen_rows.shape[1]
        session = np.full((len(seen_rows), width), -1, np.int64)
        # -1 is the newest
        place = ranks_within(owners) - np.bincount(owners, minlength=len(seen_rows))[owners]
        kept = place >= -width
        session[owners[kept], place[kept]] = item_rows[kept]
        return _pads_first(np.concatenate([seen_rows, session], axis=1))[:, -width:]


def _without_later(seen_rows: np.ndarray, view: LiveView, status: np.ndarray) -> np.ndarray:
    """seen_rows [B, W] without items that this process does not know, noted in `status`: a past may come from
    a later log than ours."""
    later = seen_rows >= view.num_rows
    if not later.any():
        return seen_rows
    status[later.any(axis=1)] |= Degraded.UNKNOWN_ITEMS
    return _pads_first(np.where(later, -1, seen_rows))


def _pads_first(rows: np.ndarray) -> np.ndarray:
    """rows [B, W] with -1 where padded: the padding moved to the front, the rest in its order."""
    return np.take_along_axis(rows, np.argsort(rows >= 0, axis=1, kind="stable"), axis=1)

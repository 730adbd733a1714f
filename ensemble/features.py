"""Step 1, features: who is asking? user_id -> the user's past, features and status."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import ranks_within
from ensemble.contract import Degraded
from ensemble.options import Options
from ensemble.release import Release
from ensemble.snapshot import gather
from ensemble.spec import ModelSpec

Tensors = dict[str, np.ndarray]


class FeatureLookup:
    """Reads the rows of a whole batch from the release's snapshot: one binary search, one gather a table."""

    def __init__(self, model: ModelSpec, release: Release) -> None:
        release.verify_data("user_ids.npy", "users.npy", "item_ids.npy", "items.npy")
        self.user_ids, self.users = release.user_ids, release.users
        self.item_ids, self.items = release.item_ids, release.items
        self.history = release.schema.sizes.history

    def run(self, options: Options, *, user_id: np.ndarray) -> Tensors:
        """user_id [B, 1] bytes -> seen_rows [B, W], history_* [B, H…], user_* (contract.py)."""
        user_rows = self.user_ids.rows_from_ids(user_id[:, 0])
        status = np.where(user_rows == 0, Degraded.UNKNOWN_USER, 0).astype(np.int64)
        rows = self.users[user_rows]
        seen_rows = self._with_session(rows["seen"].astype(np.int64), options, status)
        return {
            **self.history_from_seen(seen_rows),
            "user_codes": np.ascontiguousarray(rows["codes"]),
            "user_values": np.ascontiguousarray(rows["values"]),
            "user_features": np.ascontiguousarray(rows["features"]),
            "user_status": status[:, None],
        }

    def history_from_seen(self, seen_rows: np.ndarray) -> Tensors:
        """seen_rows [B, W] int64 -> it, and the mask [B, H], embeddings [B, H, D] and features [B, H, F] of its last H."""
        history = seen_rows[:, -self.history :]
        return {
            "seen_rows": seen_rows,
            "history_mask": history >= 0,
            "history_embeddings": gather(history, self.items, "embedding"),
            "history_features": gather(history, self.items, "features"),
        }

    def _with_session(self, seen_rows: np.ndarray, options: Options, status: np.ndarray) -> np.ndarray:
        """Puts the session's items behind the stored past; unknown ones are dropped and noted in `status`, in place."""
        owners, ids = options.ids("session_items")
        if not len(owners):
            return seen_rows
        item_rows = self.item_ids.rows_from_ids(ids)
        status[owners[item_rows == 0]] |= Degraded.UNKNOWN_ITEMS
        owners, item_rows = owners[item_rows > 0], item_rows[item_rows > 0]
        width = seen_rows.shape[1]
        session = np.full((len(seen_rows), width), -1, np.int64)
        place = ranks_within(owners) - np.bincount(owners, minlength=len(seen_rows))[owners]  # -1 is the newest
        kept = place >= -width
        session[owners[kept], place[kept]] = item_rows[kept]
        both = np.concatenate([seen_rows, session], axis=1)
        pads_first = np.argsort(both >= 0, axis=1, kind="stable")
        return np.take_along_axis(both, pads_first, axis=1)[:, -width:]

"""What the offline stages read: a shop as dense arrays. `data.py` makes it; nothing here knows a file format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.schema import Schema

Array = np.ndarray


@dataclass(frozen=True)
class Histories:
    """Positive events of every user in time order (CSR): user row u has item_rows[offsets[u]:offsets[u + 1]]."""

    offsets: Array  # [U + 2] int64; user row 0 (unknown) is empty
    item_rows: Array  # [P] int64
    times: Array  # [P] int64, seconds (or positions, where the shop has no clock)


@dataclass(frozen=True)
class Targets:
    """Held-out next items: each row is a user, how much of the history is known, and what came next."""

    user_rows: Array  # [Q] int64
    history_ends: Array  # [Q] int64, absolute end into Histories.item_rows: known = item_rows[offsets[u]:history_ends]
    item_rows: Array  # [Q] int64, the true next item


@dataclass(frozen=True)
class Impressions:
    """Shown items and what became of them. Labels are NaN where a task is not defined (buy without a click)."""

    user_rows: Array  # [E] int64
    item_rows: Array  # [E] int64
    times: Array  # [E] int64
    history_ends: Array  # [E] int64, absolute end into Histories.item_rows: positives strictly before this impression
    labels: Array  # [E, T] float32
    truth: Array | None = None  # [E, T] float32, planted probabilities of a generated shop (aligned, tests only)


@dataclass(frozen=True)
class Dataset:
    """One shop. Rows are dense: row 0 is "unknown", row 1 + i is the i-th id in sorted (byte) order."""

    schema: Schema
    item_ids: Array  # [I] S, sorted
    user_ids: Array  # [U] S, sorted
    item_titles: Array  # [I + 1] S, UTF-8, cut at 120 bytes; empty where there is none
    item_codes: Array  # [I + 1, C] int32
    item_values: Array  # [I + 1, R] float32, standardized, 0 where missing
    user_codes: Array  # [U + 1, C] int32
    user_values: Array  # [U + 1, R] float32
    vocabularies: dict[str, dict[str, list[str]]]  # {"items": {feature: [value, …]}, "users": …}, categories only
    histories: Histories
    train_ends: Array  # [U + 1] int64, absolute end into Histories.item_rows of what may be trained on
    validation: Targets
    test: Targets
    train_impressions: Impressions | None  # None: no labels; the ranker's task is then `interact`
    validation_impressions: Impressions | None
    test_impressions: Impressions | None

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

"""Says what the release was made of: how much each part of the split has, and what the data lacks.

A figure that is missing from a report, or that nobody can be sure of, is often missing for such a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, Impressions, training_histories
from builders.data.splits import MANY_AGAIN, share_again
from ensemble.arrays import Array

_FEW_TARGETS, _SHORT = 500, 5


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Counts the parts of the split, and names what the shop's data does not have."""
    offsets, items = training_histories(dataset)
    num_users = int((np.diff(offsets) > 0).sum())
    parts = {
        "training": {
            "events": len(items),
            "users": num_users,
            "items": len(np.unique(items)),
            "impressions": _count(dataset.train_impressions),
        }
    }
    for name, targets, shown in (
        ("validation", dataset.validation, dataset.validation_impressions),
        ("test", dataset.test, dataset.test_impressions),
    ):
        parts[name] = {
            "events": len(targets.item_rows),
            "users": len(np.unique(targets.user_rows)),
            "items": len(np.unique(targets.item_rows)),
            "impressions": _count(shown),
        }
    return {"split": dataset.split["kind"], "parts": parts, "lacks": _lacks(dataset, num_users, items)}


def _count(impressions: Impressions | None) -> int:
    """Counts impressions."""
    return 0 if impressions is None else len(impressions.user_rows)


def _lacks(dataset: Dataset, num_users: int, items: Array) -> list[str]:
    """Names what the data does not have, and what follows."""
    shown, features = dataset.train_impressions, dataset.schema.items.features
    told = []
    if shown is None:
        told.append("labels: nothing says what was shown, so the ranker learns from what was taken alone")
    elif not shown.positions.any():
        told.append("positions: what was looked at only because it stood first cannot be told")
    if not features:
        told.append("item features: an item that nobody took is like any other such item")
    elif not any(f.kind in ("text", "embedding", "vector") for f in features):
        told.append("titles and pictures: a new item is known by its categories and numbers alone")
    if not dataset.schema.users.features:
        told.append("user features: a user without events is like any other such user")
    if len(dataset.test.user_rows) < _FEW_TARGETS:
        few = len(dataset.test.user_rows)
        told.append(f"more than {few:,} held-out next items: their figures have wide intervals")
    if len(items) < _SHORT * num_users:
        told.append(
            f"long pasts: {len(items) / num_users:.1f} training events a user, so that popularity and "
            "sessions have much to say"
        )
    if (again := share_again(dataset.histories)) >= MANY_AGAIN:
        told.append(
            f"items that a user had before, though {again:.0%} of events are of such ones: lists leave them "
            "out unless a request says exclude_seen = false, and these figures are of new items"
        )
    untaken = 1 - len(np.unique(items)) / max(1, dataset.num_items)
    if untaken > 0.1:
        told.append(f"training event of {untaken:.0%} of the items: only their features speak for them")
    return told


def data_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Gives head and rows of the report's table."""
    names = list(found["parts"]["training"])
    return ["", *names], [[part, *(f"{of[name]:,}" for name in names)] for part, of in found["parts"].items()]


def data_notes(found: Mapping[str, Any]) -> list[str]:
    """Writes a sentence on the split, and one on each thing that the data lacks."""
    of_rows = "Of validation and test, events are held-out next items."
    return [
        f"Split: {found['split'].replace('_', ' ')}. {of_rows}",
        *(f"No {one}." for one in found["lacks"]),
    ]

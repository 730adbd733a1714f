"""Writes down what the staged release answers some held-out users: whoever activates it asks them first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset
from builders.index.staged import StagedRelease
from ensemble.local import LocalPipeline
from ensemble.options import LATEST_S
from ensemble.release.canary import CANARY_USER, MAX_USERS, TOP_K, Canary, canary_from_answer


def canary_of(dataset: Dataset, staged: Path) -> Canary:
    """Asks the staged release, as it will be served, about held-out users and one whom nobody knows."""
    release = StagedRelease(staged)
    sizes = release.schema.sizes
    user_ids = [*_held_out(dataset, release, min(MAX_USERS, sizes.max_batch) - 1), CANARY_USER]
    pipeline = LocalPipeline(release)
    top_k, newest = min(TOP_K, sizes.max_top_k), int(dataset.histories.times.max(initial=0))
    newest = min(newest, LATEST_S - 1)
    try:
        answer = pipeline.recommend(user_ids, {"top_k": top_k, "time": newest})
        return canary_from_answer(top_k, user_ids, answer, newest)
    finally:
        release.close()


def _held_out(dataset: Dataset, release: StagedRelease, count: int) -> list[str]:
    """Picks `count` users evenly from those held out, or from all where none are."""
    rows = np.unique(dataset.test.user_rows)
    if not len(rows):
        rows = np.arange(1, len(release.user_ids.sorted_ids) + 1)
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    return [release.user_ids.sorted_ids[row - 1].decode() for row in rows[places].tolist()]

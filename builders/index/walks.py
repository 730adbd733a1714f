"""Finds where walks of two steps lead from each item, over the graph of what is taken soon before or after.

The chances are exact, not sampled: what DeepWalk's walks (Perozzi et al., KDD 2014) estimate from many draws
is for two steps a product of sparse lists. Steps go both ways in time, as what shares a follower is alike.

Axes: U users, I items, L neighbours, K kept ends, n items of a piece.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, training_histories
from builders.index.choice import FLAT_BELOW
from builders.index.transitions import keep_best, num_shards, summed_pairs
from ensemble.arrays import Array, sum_by_row
from ensemble.steps.walks import WALKS

NEIGHBOURS, KEPT = 50, 100  # that a step may lead to, and ends kept an item; half and a quarter if large
_AT_ONCE = 1 << 22  # walks of a piece


def write_walks(dataset: Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """Writes walks.npy of the training part of the histories; it goes with no settings."""
    large = dataset.num_items >= FLAT_BELOW
    near, kept = (NEIGHBOURS // 2, KEPT // 4) if large else (NEIGHBOURS, KEPT)
    histories = training_histories(dataset)
    rows, scores = item_walks(*histories, dataset.num_items, neighbours=near, kept=kept)
    out = np.zeros(len(rows), [("rows", "<i4", rows.shape[1:]), ("scores", "<f4", scores.shape[1:])])
    out["rows"], out["scores"] = rows, scores
    np.save(folder / WALKS, out)
    return {}


def item_walks(
    offsets: Array, rows: Array, num_items: int, *, window: int = 8, neighbours: int, kept: int
) -> tuple[Array, Array]:
    """Gives the ends of walks of two steps, with their chances times the root of all that ties the item, as
    transitions are weighed: [I + 1, K] int32 best first, padded with -1, and float32, padded with 0.

    offsets [U + 1] int64 and rows int64 are sequences in time order. A step takes a tie by its weight, 1 /
    distance within `window`, summed over both directions; an item's weaker ties than its best are left out.
    """
    near, share, total = _ties(offsets, rows, num_items, window, neighbours)
    out = np.full((num_items + 1, kept), -1, np.int32)
    scores = np.zeros((num_items + 1, kept), np.float32)
    size = max(1, _AT_ONCE // neighbours**2)
    for start in range(0, num_items + 1, size):
        own = np.arange(start, min(start + size, num_items + 1))
        ends = near[near[own]].reshape(len(own), -1).astype(np.int64)
        chance = (share[own][:, :, None] * share[near[own]]).reshape(len(own), -1)
        chance[(ends <= 0) | (ends == own[:, None])] = 0
        ends, chance = sum_by_row(np.where(chance > 0, ends, -1), chance)
        best = np.argsort(-chance, axis=1, kind="stable")[:, :kept]
        chance, ends = np.take_along_axis(chance, best, 1), np.take_along_axis(ends, best, 1)
        places = slice(0, best.shape[1])
        out[own, places] = np.where(chance > 0, ends, -1)
        scores[own, places] = chance * np.sqrt(total[own])[:, None]
    return out, scores


def _ties(
    offsets: Array, rows: Array, num_items: int, window: int, neighbours: int
) -> tuple[Array, Array, Array]:
    """Gives each item's strongest ties: rows [I + 1, L] int32 (0 where there is none), their share of all
    ties [I + 1, L] float32, and the weight of all [I + 1] float32."""
    owner = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    near = np.zeros((num_items + 1, neighbours), np.int32)
    share = np.zeros((num_items + 1, neighbours), np.float32)
    total = np.zeros(num_items + 1, np.float32)
    shards = num_shards(2 * len(rows), window)
    for shard in range(shards):
        ways = ((owner, rows), (owner[::-1], rows[::-1]))
        sources, targets, weights = (
            np.concatenate(parts)
            for parts in zip(
                *(summed_pairs(*way, num_items, window, shard, shards) for way in ways), strict=True
            )
        )
        key, place = np.unique(sources * np.int64(num_items + 1) + targets, return_inverse=True)
        weights = np.bincount(place, weights, minlength=len(key))
        sources, targets = key // (num_items + 1), key % (num_items + 1)
        all_ties = np.bincount(sources, weights, minlength=num_items + 1)
        total += all_ties.astype(np.float32)
        keep_best(sources, targets, weights / all_ties[sources], near, share)
    return near, share, total

"""Counts item-to-item transitions, in seconds: what people took soon after an item, a source of recall.

Axes: U users, I items, L neighbours, B batch, H history, K newest items looked at.
"""

import numpy as np

from ensemble.arrays import Array, ranks_within

_PAIRS_AT_ONCE = 1 << 25  # about 1.5 GB of work space


def item_transitions(
    offsets: Array, rows: Array, num_items: int, *, window: int = 8, neighbours: int = 100
) -> tuple[Array, Array]:
    """Counts b after a at distance d <= window as 1/d, and divides by the root of all that followed a.

    The root stands between a plain count (which lets popular items speak loudest) and a probability (which
    believes a rare item's single follower). Sequences as in builders.encoders.sequences: offsets [U + 1]
    int64, rows int64 in time order. Returns neighbour_rows [I + 1, L] int32, best first, padded with -1, and
    neighbour_scores [I + 1, L] float32, padded with 0.
    """
    owner = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    neighbour_rows = np.full((num_items + 1, neighbours), -1, np.int32)
    neighbour_scores = np.zeros((num_items + 1, neighbours), np.float32)
    shards = num_shards(len(rows), window)
    for shard in range(shards):
        sources, targets, weights = summed_pairs(owner, rows, num_items, window, shard, shards)
        total = np.bincount(sources, weights, minlength=num_items + 1)
        keep_best(sources, targets, weights / np.sqrt(total[sources]), neighbour_rows, neighbour_scores)
    return neighbour_rows, neighbour_scores


def num_shards(num_events: int, window: int) -> int:
    """Says into how many parts of the items the pairs are cut, so that each fits into memory."""
    return 1 + num_events * window // _PAIRS_AT_ONCE


def keep_best(sources: Array, targets: Array, scores: Array, rows: Array, best: Array) -> None:
    """Writes each source's best targets [n] into its row of `rows` [I + 1, L], their scores into `best`."""
    order = np.lexsort((targets, -scores, sources))
    sources = sources[order]
    place = ranks_within(sources)
    kept = place < rows.shape[1]
    rows[sources[kept], place[kept]] = targets[order][kept]
    best[sources[kept], place[kept]] = scores[order][kept]


def summed_pairs(
    owner: Array, rows: Array, num_items: int, window: int, shard: int, shards: int
) -> tuple[Array, Array, Array]:
    """Sums the weight of each pair whose source has row % shards == shard: sources, targets, weights [n]."""
    keys, weights = [], []
    for distance in range(1, min(window, len(rows) - 1) + 1):
        before, after = rows[:-distance], rows[distance:]
        chosen = (owner[:-distance] == owner[distance:]) & (before != after) & (before % shards == shard)
        keys.append(before[chosen] * np.int64(num_items + 1) + after[chosen])
        weights.append(np.full(len(keys[-1]), 1 / distance, np.float32))
    if not keys:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    key, weight = np.concatenate(keys), np.concatenate(weights)
    order = np.argsort(key, kind="stable")
    key, weight = key[order], weight[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    summed = np.add.reduceat(weight.astype(np.float64), first) if len(first) else np.zeros(0)
    return key[first] // (num_items + 1), key[first] % (num_items + 1), summed

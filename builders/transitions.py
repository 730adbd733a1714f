"""Item-to-item transitions: what people took up after an item, from training histories (a short-window item kNN)."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def item_transitions(offsets: Array, rows: Array, num_items: int, *, window: int = 3, neighbours: int = 50) -> tuple[Array, Array]:
    """Histories (offsets [U + 1], rows [P]) -> neighbour rows [I + 1, L] int32 (best first, -1 padded), scores [I + 1, L] float32."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    keys, weights = [], []
    for distance in range(1, window + 1):
        same = users[:-distance] == users[distance:]
        keys.append(rows[:-distance][same] * (num_items + 1) + rows[distance:][same])
        weights.append(np.full(int(same.sum()), 1 / distance, np.float32))
    pairs, place = np.unique(np.concatenate(keys), return_inverse=True)
    scores = np.bincount(place.ravel(), np.concatenate(weights), len(pairs)).astype(np.float32)
    sources, targets = pairs // (num_items + 1), pairs % (num_items + 1)
    kept = sources != targets
    sources, targets, scores = sources[kept], targets[kept], scores[kept]
    order = np.lexsort((targets, -scores, sources))
    sources, targets, scores = sources[order], targets[order], scores[order]
    rank = np.arange(len(sources)) - np.searchsorted(sources, sources)
    kept = rank < neighbours
    width = max(1, min(neighbours, int(rank.max(initial=0)) + 1))
    out_rows, out_scores = np.full((num_items + 1, width), -1, np.int32), np.zeros((num_items + 1, width), np.float32)
    out_rows[sources[kept], rank[kept]], out_scores[sources[kept], rank[kept]] = targets[kept], scores[kept]
    return out_rows, out_scores

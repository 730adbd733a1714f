"""Says how well two views of items find each other.

Axes: n pairs, D components.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array

_FIRST = 10


def pair_figures(
    first: Array, second: Array, names: tuple[str, str] = ("title", "picture")
) -> dict[str, float]:
    """Compares pairs [n, D]: mean cosines, and R@10 both ways; ties count half."""
    one, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (first, second))
    scores, count = one @ other.T, len(first)
    true = float(np.trace(scores)) / count
    return {
        "true pairs": round(true, 3),
        "others": round((float(scores.sum()) - true * count) / max(1, count * (count - 1)), 3),
        f"{names[0]} -> {names[1]}": round(_recall(scores), 3),
        f"{names[1]} -> {names[0]}": round(_recall(scores.T), 3),
    }


def _recall(scores: Array) -> float:
    """Gives the share of rows of scores [n, n] whose own column is among the first ten."""
    own = np.diag(scores)[:, None]
    ranks = (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return float((ranks < _FIRST).mean())

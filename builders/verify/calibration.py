"""Says how often what was foretold came true: the points of a reliability diagram of each task.

Axes: E held-out impressions, T tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from builders.data.dataset import Impressions
from ensemble.arrays import Array
from ensemble.schema import Task

_BINS, _FEWEST = 10, 20  # bins of equal mass, and rows that a bin has at least
_Z = 1.96  # of a 95% interval


def calibration(tasks: tuple[Task, ...], impressions: Impressions, values: Array) -> dict[str, Any]:
    """Cuts each binary task's rows by their probability [E, T] into bins of as many rows, and compares the
    mean probability of a bin with how often it came true; 95% intervals by Wilson's score."""
    found = {}
    for at, task in enumerate(tasks):
        labels, foretold = impressions.labels[:, at], values[:, at]
        known = np.isfinite(labels) & np.isfinite(foretold)
        if task.kind == "binary" and known.sum() >= _FEWEST:
            found[task.name] = _points(labels[known] > 0.5, foretold[known])
    return found


def _points(came_true: Array, foretold: Array) -> list[dict[str, float]]:
    """Gives the points of a diagram, from the least probable on."""
    order = np.argsort(foretold, kind="stable")
    bins = np.array_split(order, min(_BINS, max(1, len(order) // _FEWEST)))
    return [
        {"foretold": float(foretold[rows].mean()), **_rate(int(came_true[rows].sum()), len(rows))}
        for rows in bins
    ]


def _rate(hits: int, rows: int) -> dict[str, float]:
    """Gives a rate with the interval of Wilson (JASA 22, 1927)."""
    rate, square = hits / rows, _Z**2 / rows
    middle = (rate + square / 2) / (1 + square)
    half = _Z / (1 + square) * np.sqrt(rate * (1 - rate) / rows + square / (4 * rows))
    return {"rate": rate, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "rows": rows}

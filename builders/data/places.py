"""Groups the positions at which items were shown into places, and counts what each place is worth.

Axes: E impressions, P places, T tasks. Positions 1 to 32 have a place each, those behind them one for each
quarter of a doubling; place 0 is unknown.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.schema import Task

_EXACT = 32  # places told apart
_PER_DOUBLING = 4  # buckets of the places behind
NUM_PLACES = 1 + _EXACT + 8 * _PER_DOUBLING  # the last one begins at 32 * 2 ^ (31 / 4), about 6,900
_STRENGTH = 30.0  # exposures of the average that a place's first number begins with


def places_of(positions: Array) -> Array:
    """Gives the buckets of positions (any shape, 1 = first, 0 = unknown): uint8, 0 .. NUM_PLACES - 1."""
    behind = np.log2(np.maximum(positions, _EXACT + 1) / _EXACT) * _PER_DOUBLING
    bucket = np.where(positions <= _EXACT, positions, _EXACT + 1 + np.floor(behind))
    return np.clip(bucket, 0, NUM_PLACES - 1).astype(np.uint8)


def place_rates(tasks: tuple[Task, ...], places: Array, labels: Array) -> Array:
    """Counts how often each place leads to each binary task's event: smoothed rates [P, T] float64; NaN for
    unknown places and for numbers. places [E], labels [E, T], NaN where undefined."""
    rates = np.full((NUM_PLACES, len(tasks)), np.nan)
    for t, task in enumerate(tasks):
        known = ~np.isnan(labels[:, t]) & (places > 0)
        if task.kind != "binary" or not known.any():
            continue
        shown = np.bincount(places[known], minlength=NUM_PLACES)
        came = np.bincount(places[known], labels[known, t], minlength=NUM_PLACES)
        rate = np.clip(came.sum() / shown.sum(), 1e-6, 1 - 1e-6)
        rates[1:, t] = ((came + _STRENGTH * rate) / (shown + _STRENGTH))[1:]
    return rates

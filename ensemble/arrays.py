"""Works on ragged and keyed arrays of a whole batch of users at once, without loops: what NumPy lacks."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]  # by the contract's names


def ranks_within(owners: Array) -> Array:
    """Gives each entry's position among its owner's, from 0: owners [L] sorted ascending -> [L] int64."""
    return np.arange(len(owners)) - np.searchsorted(owners, owners)


def sum_by_row(rows: Array, scores: Array) -> tuple[Array, Array]:
    """Sums the scores of equal rows of a user: rows and scores [B, X] -> the same shape.

    Each row stands once a user; where another one stood there are row -1 and score 0.
    """
    order = np.argsort(rows, axis=1, kind="stable")
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    last = np.ones(rows.shape, bool)
    last[:, :-1] = rows[:, 1:] != rows[:, :-1]
    flat_last = np.flatnonzero(last.ravel())
    starts = np.concatenate([[0], flat_last[:-1] + 1]) if len(flat_last) else flat_last
    sums = np.zeros(rows.size, scores.dtype)
    if len(starts):
        sums[flat_last] = np.add.reduceat(scores.ravel(), starts)
    sums = sums.reshape(rows.shape)
    kept = last & (rows > 0)
    return np.where(kept, rows, -1), np.where(kept, sums, 0)


def look_up(rows: Array, known_rows: Array, known_scores: Array, num_rows: int) -> Array:
    """Gives the score of each of rows [B, N] in its user's list known_rows, known_scores [B, P].

    The score [B, N] float32 is 0 where a row is not in the list. All rows are below `num_rows`.
    """
    owner = np.arange(len(rows))[:, None] * num_rows
    keys, known = rows + owner, np.where(known_rows > 0, known_rows + owner, -1).ravel()
    order = np.argsort(known, kind="stable")
    sorted_keys = known[order]
    if not len(sorted_keys):
        return np.zeros(rows.shape, np.float32)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where((sorted_keys[place] == keys) & (rows > 0), known_scores.ravel()[order][place], 0).astype(
        np.float32
    )

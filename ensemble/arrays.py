"""Works on ragged and keyed arrays of a whole batch of users at once, without loops: what NumPy lacks."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]  # by the contract's names


def ranks_within(owners: Array) -> Array:
    """Gives each entry's position among its owner's, from 0: owners [L] sorted ascending -> [L] int64."""
    return np.arange(len(owners)) - np.searchsorted(owners, owners)


def first_kept(rows: Array, limit: int) -> Array:
    """Moves the first `limit` positive rows of each user to the front: rows [B, X] int64 -> [B, X or limit],
    padded with -1."""
    kept = rows > 0
    rank = np.cumsum(kept, axis=1)
    if limit < rows.shape[1]:
        kept &= rank <= limit
    width = min(limit, rows.shape[1])
    if np.count_nonzero(kept) == len(rows) * width:
        return rows[kept].reshape(len(rows), width)
    out = np.full((len(rows), width), -1, np.int64)
    users, columns = np.nonzero(kept)
    out[users, rank[users, columns] - 1] = rows[users, columns]
    return out


def sorted_by_row(rows: Array) -> tuple[Array, Array]:
    """Sorts each user's rows [B, X] int64 below 2^40: the rows ascending, and their columns; equal rows by
    column. Row and column are one number: NumPy sorts numbers far faster than it finds their order.
    """
    bits = max(1, rows.shape[1] - 1).bit_length()
    keys = np.sort((rows << bits) | np.arange(rows.shape[1]), axis=1)
    return keys >> bits, keys & ((1 << bits) - 1)


def without_repeats(rows: Array) -> Array:
    """Replaces by -1 whatever of a user's rows [B, X] int64 stands further left already."""
    ascending, columns = sorted_by_row(rows)
    users, places = np.nonzero(ascending[:, 1:] == ascending[:, :-1])
    rows = rows.copy()
    rows[users, columns[users, places + 1]] = -1
    return rows


def sum_by_row(rows: Array, scores: Array) -> tuple[Array, Array]:
    """Sums the scores of equal rows of a user: rows and scores [B, X] -> the same shape, rows ascending.

    Each row stands once a user; where another one stood there are row -1 and score 0.
    """
    rows, columns = sorted_by_row(rows)
    scores = np.take_along_axis(scores, columns, axis=1)
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
    """Gives the score of each of rows [B, N] in its user's list known_rows, known_scores [B, P], as
    sum_by_row gives them.

    The score [B, N] float32 is 0 where a row is not in the list. All rows are below `num_rows`.
    """
    owner = np.arange(len(rows))[:, None] * num_rows
    kept = known_rows > 0
    known, scores = (known_rows + owner)[kept], known_scores[kept]
    if not len(known):
        return np.zeros(rows.shape, np.float32)
    keys = rows + owner
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where((known[place] == keys) & (rows > 0), scores[place], 0).astype(np.float32)

"""Lists of candidates from several places -> one list: shards, or the main index and the live items beside
it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.arrays import Array

Found = tuple[
    np.ndarray, np.ndarray
]  # rows [Q, depth] int64 best first, padded with -1; scores [Q, depth] float32, -inf where padded


def merge_found(parts: Sequence[Found], depth: int) -> Found:
    """The best `depth` of all parts [Q, any length], in any order; no row is in two of them. Equal scores in
    order of rows.

    The parts may be shards of one catalogue, searched anywhere: rows are the catalogue's, so nothing else has
    to be agreed on.
    """
    return cut(
        np.concatenate([p[0] for p in parts], axis=1), np.concatenate([p[1] for p in parts], axis=1), depth
    )


def cut(rows: np.ndarray, scores: np.ndarray, depth: int) -> Found:
    """[Q, X] in any order -> the best `depth`, equal scores in order of rows, padded with -1 and -inf."""
    order = np.lexsort((rows, -scores), axis=-1)[:, :depth]
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    if rows.shape[1] < depth:
        gap = ((0, 0), (0, depth - rows.shape[1]))
        rows, scores = np.pad(rows, gap, constant_values=-1), np.pad(scores, gap, constant_values=-np.inf)
    return rows, scores


def nothing_found(num_queries: int, depth: int) -> Found:
    """A list of padding for each query."""
    return np.full((num_queries, depth), -1, np.int64), np.full((num_queries, depth), -np.inf, np.float32)


def recall_share(found_rows: Array, true_positions: Array) -> float:
    """Share of the true best positions [Q, k] that are among found rows [Q, *] (row = position + 1)."""
    return float(np.mean([np.isin(t + 1, f).mean() for f, t in zip(found_rows, true_positions, strict=True)]))

"""Merges lists of found items into one: of shards, or of the main index and the live items beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.arrays import Array

# Rows [Q, depth] int64 best first, padded with -1; scores [Q, depth] float32, -inf where padded.
Found = tuple[Array, Array]


def merge_found(parts: Sequence[Found], depth: int) -> Found:
    """Gives the best `depth` of all parts [Q, any length], each in any order; no row may be in two of them.
    Equal scores come in order of rows.

    The parts may be shards of one catalogue, searched anywhere: rows are the catalogue's, so nothing else has
    to be agreed on.
    """
    rows, scores = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
    return cut(rows, scores, depth)


def cut(rows: Array, scores: Array, depth: int) -> Found:
    """Gives the best `depth` of rows and scores [Q, X] in any order; equal scores come in order of rows."""
    order = np.lexsort((rows, -scores), axis=-1)[:, :depth]
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    if rows.shape[1] < depth:
        gap = ((0, 0), (0, depth - rows.shape[1]))
        rows, scores = np.pad(rows, gap, constant_values=-1), np.pad(scores, gap, constant_values=-np.inf)
    return rows, scores


def cut_sorted(rows: Array, scores: Array, depth: int) -> Found:
    """Gives what cut() gives, of scores [Q, X] that are in order: only lists with equal scores are sorted."""
    tied = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((rows[tied], -scores[tied]), axis=-1)
        rows[tied] = np.take_along_axis(rows[tied], order, axis=1)
        scores[tied] = np.take_along_axis(scores[tied], order, axis=1)
    gap = ((0, 0), (0, max(0, depth - rows.shape[1])))
    rows = np.pad(rows[:, :depth], gap, constant_values=-1)
    return rows, np.pad(scores[:, :depth], gap, constant_values=-np.inf)


def nothing_found(num_queries: int, depth: int) -> Found:
    """Gives a list of padding for each query."""
    return np.full((num_queries, depth), -1, np.int64), np.full((num_queries, depth), -np.inf, np.float32)


def recall_share(found_rows: Array, true_positions: Array) -> float:
    """Gives the share of the true best positions [Q, k] that found rows [Q, *] have (row = position + 1)."""
    return float(np.mean([np.isin(t + 1, f).mean() for f, t in zip(found_rows, true_positions, strict=True)]))

"""Merges lists of found items into one: of shards, or of the main index and the live items beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.arrays import Array

# Rows [Q, depth] int64 best first, padded with -1; scores [Q, depth] float32, -inf where padded.
Found = tuple[Array, Array]
_LEAST = np.float32(-1e38)  # what is below is no score but padding
_LAST_BITS = np.float32(3e-7)  # five steps of a float32 near 1


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
    order = np.lexsort((rows, -scores), axis=-1)
    in_order = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return cut_sorted(*in_order, depth)


def cut_sorted(rows: Array, scores: Array, depth: int) -> Found:
    """Gives the best `depth` of rows and scores [Q, X] that are in order; equal scores come in order of rows.

    Items that are the same to the encoder get scores that differ in the last bits, by their place and by how
    many queries were multiplied at once: what is equal but for these counts as equal, and gets the greatest
    score of them. So no list depends on the batch in which it was asked for.
    """
    finite = np.maximum(scores, _LEAST)
    apart = finite[:, :-1] - finite[:, 1:] > last_bits(finite[:, :-1])
    tied = np.flatnonzero(~(apart | (scores[:, 1:] <= _LEAST)).all(axis=1))
    if len(tied):
        group = np.zeros((len(tied), scores.shape[1]), np.int64)
        np.cumsum(apart[tied], axis=1, out=group[:, 1:])
        order = np.lexsort((rows[tied], group), axis=-1)
        rows[tied] = np.take_along_axis(rows[tied], order, axis=1)
        first = np.maximum.accumulate(np.where(_starts(apart[tied]), np.arange(scores.shape[1]), 0), axis=1)
        scores[tied] = np.take_along_axis(scores[tied], first, axis=1)
    gap = ((0, 0), (0, max(0, depth - rows.shape[1])))
    rows = np.pad(rows[:, :depth], gap, constant_values=-1)
    return rows, np.pad(scores[:, :depth], gap, constant_values=-np.inf)


def last_bits(scores: Array) -> Array:
    """Gives what two scores [...] may differ by and still be sums of the same products in another order."""
    return _LAST_BITS * np.maximum(1, np.abs(scores))


def _starts(apart: Array) -> Array:
    """Says where a group of equal scores begins: apart [Q, X - 1] bool -> [Q, X] bool."""
    return np.concatenate([np.ones((len(apart), 1), bool), apart], axis=1)


def nothing_found(num_queries: int, depth: int) -> Found:
    """Gives a list of padding for each query."""
    return np.full((num_queries, depth), -1, np.int64), np.full((num_queries, depth), -np.inf, np.float32)


def recall_share(found_rows: Array, true_positions: Array) -> float:
    """Gives the share of the true best positions [Q, k] that found rows [Q, *] have (row = position + 1)."""
    return float(np.mean([np.isin(t + 1, f).mean() for f, t in zip(found_rows, true_positions, strict=True)]))

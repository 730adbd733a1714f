"""Says how good a search is, and what a choice may cost it."""

from __future__ import annotations

import numpy as np

from builders.metrics import ndcg
from builders.search.queries import FULL, KINDS
from ensemble.arrays import Array

TOP = 10
MOST_LOST = 0.02  # of NDCG, for what is worth it beside
FIRST = 0.95  # of full titles that find their own item first


def place_of(x: Array, row: int) -> int:
    """Gives a row's place from 0 among all [R], ties by row."""
    better = np.count_nonzero(x[1:] > x[row])
    return better + int(np.count_nonzero(x[1:row] == x[row]))


def mean_ndcg(ranks: Array, kinds: Array) -> float:
    """Gives NDCG@10 of the places [Q] of queries' own items, the mean over the queries' kinds [Q]; 0 of
    none."""
    found = [ndcg(ranks[kinds == kind], TOP) for kind in KINDS if (kinds == kind).any()]
    return float(np.mean(found)) if found else 0.0


def full_titles_first(ranks: Array, kinds: Array) -> Array:
    """Gives the share of full titles that find their own item first under each way [W], of places [Q, W]; 1
    where none is asked."""
    full = ranks[kinds == FULL]
    return (full == 0).mean(axis=0) if len(full) else np.ones(ranks.shape[1])

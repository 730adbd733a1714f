"""Chooses what pictures count for a typed query where no text says anything of an item; perhaps nothing.

Half of the items that the space has not learned from (builders/search/shared_space.py) lose title and text,
as if the catalogue lacked them; queries look for these and for the others. The weight is what finds most of
both (NDCG@10) on one half of the items, costs those that are told of at most 1% there, and lets full titles
find their own item first. It is kept where on the other half it surely finds more of the hidden ones, and
costs the others at most 2% and no full title its place; else it is 0, and nothing is asked.

Axes: Q queries, R rows, W weights.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from builders.data.dataset import Dataset
from builders.metrics import gains
from builders.search.measures import FIRST, MOST_LOST, TOP, full_titles_first, mean_ndcg, place_of
from builders.search.queries import FULL, Queries
from builders.search.shared_space import is_judged
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.contract import IMAGE, TEXT
from ensemble.steps.search import Query, SearchRecall
from ensemble.steps.search_settings import SearchSettings

WEIGHTS = (0.0, 0.5, 0.75, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0)


@dataclass(frozen=True)
class Ranks:
    """Holds the place of each query's own item under each weight [Q, W] int64, whether it is hidden [Q] bool,
    the queries' kinds [Q] and items [Q]."""

    ranks: Array
    hidden: Array
    kinds: Array
    items: Array

    def of(self, chosen: Array) -> Ranks:
        """Picks some queries."""
        return Ranks(self.ranks[chosen], self.hidden[chosen], self.kinds[chosen], self.items[chosen])

    def ndcg(self, hidden: bool) -> Array:
        """Gives NDCG@10 [W] of the queries for items that are hidden, or for the others."""
        mine = self.hidden == hidden
        return np.array([mean_ndcg(of, self.kinds[mine]) for of in self.ranks[mine].T])

    def in_list(self) -> Array:
        """Gives the share of full titles of hidden items [W] that find them among the first ten."""
        full = self.ranks[(self.kinds == FULL) & self.hidden]
        return (full < TOP).mean(axis=0) if len(full) else np.zeros(len(WEIGHTS))

    def first(self) -> Array:
        """Gives the share of full titles [W] that find their own item first, of those that are not hidden."""
        return full_titles_first(self.ranks[~self.hidden], self.kinds[~self.hidden])

    def allowed(self, most_lost: float) -> Array:
        """Says which weights [W] lose at most a share of the NDCG of items that are told of, and no more full
        titles than they may."""
        told, first = self.ndcg(False), self.first()
        return (told >= (1 - most_lost) * told[0]) & (first >= min(FIRST, float(first[0])))


def judged_rows(dataset: Dataset) -> Array:
    """Says which rows [I + 1] are of items that the space has not learned from."""
    return np.concatenate([[False], is_judged(dataset.item_ids)])


def hidden_rows(dataset: Dataset) -> Array:
    """Says which rows [I + 1] are asked as if nothing told of them: every other of the judged ones."""
    other = [hides(one) for one in dataset.item_ids.tolist()]
    return judged_rows(dataset) & np.concatenate([[False], np.array(other, bool)])


def hides(item_id: bytes) -> bool:
    """Says whether an item is hidden, where it is judged."""
    return zlib.crc32(b"hidden" + item_id) % 2 == 0


def fit_shown(
    dataset: Dataset, recall: SearchRecall, asked: list[Query], queries: Queries, settings: SearchSettings
) -> tuple[float, dict[str, Any]]:
    """Chooses the weight; gives what the report says of it beside, {} where the release has no space.

    asked: the queries as the step takes them, in the order of `queries`.
    """
    if not recall.shared:
        return 0.0, {}
    rows, hidden = queries.rows, hidden_rows(dataset)
    there = _has(recall, rows, TEXT) & _has(recall, rows, IMAGE)
    mine = np.flatnonzero(judged_rows(dataset)[rows] & there)
    if not len(mine):
        return 0.0, {}
    ranks = [_ranks(recall, asked[at], int(rows[at]), hidden, settings) for at in mine.tolist()]
    return choose(Ranks(np.array(ranks), hidden[rows[mine]], queries.kinds[mine], rows[mine]))


def choose(found: Ranks) -> tuple[float, dict[str, Any]]:
    """Chooses the weight on one half of the items, hidden and told ones alike, and judges it on the other."""
    _, item = np.unique(np.stack([found.hidden, found.items]), axis=1, return_inverse=True)
    tuned = item.ravel() % 2 == 0
    best, judging = found.of(tuned), found.of(~tuned)
    # half of what may be lost: chance moves one half against the other
    at = int(np.argmax(np.where(best.allowed(MOST_LOST / 2), best.ndcg(True) + best.ndcg(False), -1)))
    told, unseen, seen = judging.ndcg(False), judging.ndcg(True), judging.in_list()
    first = judging.first()
    before, after = (gains(judging.ranks[judging.hidden, place], TOP) for place in (0, at))
    low = paired_difference(before, after, judging.items[judging.hidden]).low if len(before) else 0.0
    is_on = bool(at and low > 0 and judging.allowed(MOST_LOST)[at])
    report = {
        "on": is_on,
        "weight": WEIGHTS[at],
        "queries": len(judging.items),
        "hidden": {
            "without": float(unseen[0]),
            "with": float(unseen[at]),
            "gain_at_least": float(low),
            "title_in_first_ten": float(seen[at]),
        },
        "told": {"without": float(told[0]), "with": float(told[at])},
        "full_title_first": {"without": float(first[0]), "with": float(first[at])},
    }
    return WEIGHTS[at] if is_on else 0.0, report


def _has(recall: SearchRecall, rows: Array, model: str) -> Array:
    """Says of which rows [Q] a text, or a picture, is encoded."""
    looks = [one for one in recall.looks.values() if one.feature.encoder == model]
    return np.any([one.own[rows].any(axis=1) for one in looks], axis=0)


def _ranks(
    recall: SearchRecall, query: Query, row: int, hidden: Array, settings: SearchSettings
) -> list[int]:
    """Gives a row's place under each weight, in a catalogue without what tells of the hidden rows [R]."""
    view = recall.live.view
    scores = recall.scores(query, view)
    text = scores.text if scores.text is not None else np.zeros_like(scores.words)
    words, text = np.where(hidden, 0, scores.words), np.where(hidden, 0, text)
    cosines = recall.cosines(query, view, TEXT, IMAGE)
    if cosines is not None:
        cosines = np.where((words == 0) & (text == 0), cosines, 0)
    scores = replace(scores, words=words, text=text, shown=cosines)
    settled = (replace(settings, shown_weight=weight) for weight in WEIGHTS)
    return [place_of(scores.x_text(one), row) for one in settled]

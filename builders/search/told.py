"""Chooses what texts count for a photo where an item has no picture; perhaps nothing.

Half of the items that the space has not learned from (builders/search/shared_space.py) lose their pictures,
as if the catalogue lacked them; the pictures of these and of the others are asked. A hidden item has to be
found by its own picture (NDCG@10); of any other the first ten should stay those that they are where no
picture is hidden (the share that does), as it finds itself anyhow. The weight is what is best by both on one
half of the items and costs those others at most 1% there. It is kept where on the other half it surely finds
more of the hidden ones, and costs the others at most 2%; else it is 0, and nothing is asked.

Axes: Q queries, R rows, W weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from builders.data.dataset import Dataset
from builders.metrics import gains, ndcg
from builders.search.measures import MOST_LOST, TOP, place_of
from builders.search.shown import WEIGHTS, hidden_rows, judged_rows
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.contract import IMAGE, TEXT
from ensemble.steps.search import Query, Scores, SearchRecall
from ensemble.steps.search_settings import SearchSettings

_MOST = 240  # items whose pictures are asked


@dataclass(frozen=True)
class Photos:
    """Holds what photos find under each weight: the place of a hidden item by its own [Qh, W] int64, and of
    others' first ten the share [Qo, W] that stays; items [Qh], [Qo]."""

    places: Array
    stays: Array

    def of(self, even: bool) -> Photos:
        """Gives one half of the items."""
        start = 0 if even else 1
        return Photos(self.places[start::2], self.stays[start::2])

    def ndcg(self) -> Array:
        """Gives NDCG@10 of hidden items [W]."""
        return np.array([ndcg(of, TOP) for of in self.places.T])

    def allowed(self, most_lost: float) -> Array:
        """Says which weights [W] lose at most a share of what stays."""
        stays = self.stays.mean(axis=0)
        return stays >= (1 - most_lost) * stays[0]


def fit_told(
    dataset: Dataset, recall: SearchRecall, settings: SearchSettings, rng: np.random.Generator
) -> tuple[float, dict[str, Any]]:
    """Chooses the weight; gives what the report says of it beside, {} where the release has no space that
    photos and texts share."""
    looks = next((one for one in recall.looks.values() if one.feature.encoder == IMAGE), None)
    if looks is None or not {TEXT, IMAGE} <= {one.feature.encoder for one in recall.shared.values()}:
        return 0.0, {}
    hidden, judged = hidden_rows(dataset), judged_rows(dataset)
    texts = [one for one in recall.looks.values() if one.feature.encoder == TEXT]
    there = looks.own.any(axis=1) & np.any([one.own.any(axis=1) for one in texts], axis=0)
    asked = [
        np.sort(rng.permutation(np.flatnonzero(there & judged & (hidden == gone)))[: _MOST // 2])
        for gone in (True, False)
    ]
    if min(map(len, asked)) < 2:
        return 0.0, {}
    found = [
        [_found(recall, looks.feature.name, row, hidden, settings) for row in of.tolist()] for of in asked
    ]
    return choose(Photos(np.array([one[0] for one in found[0]]), np.array([one[1] for one in found[1]])))


def choose(photos: Photos) -> tuple[float, dict[str, Any]]:
    """Chooses the weight on one half of the items, and judges it on the other."""
    best, judging = photos.of(True), photos.of(False)
    # half of what may be lost: chance moves one half against the other
    at = int(np.argmax(np.where(best.allowed(MOST_LOST / 2), best.ndcg() + best.stays.mean(axis=0), -1)))
    before, after = (gains(judging.places[:, place], TOP) for place in (0, at))
    low = paired_difference(before, after, np.arange(len(before))).low
    is_on = bool(at and low > 0 and judging.allowed(MOST_LOST)[at])
    unseen, stays = judging.ndcg(), judging.stays.mean(axis=0)
    report = {
        "on": is_on,
        "weight": WEIGHTS[at],
        "queries": len(judging.places) + len(judging.stays),
        "hidden": {
            "without": float(unseen[0]),
            "with": float(unseen[at]),
            "gain_at_least": float(low),
            "in_first_ten": float((judging.places[:, at] < TOP).mean()),
        },
        "first_ten_stay": {"without": float(stays[0]), "with": float(stays[at])},
    }
    return WEIGHTS[at] if is_on else 0.0, report


def _found(
    recall: SearchRecall, feature: str, row: int, hidden: Array, settings: SearchSettings
) -> tuple[list[int], list[float]]:
    """Asks an item's own picture: its place under each weight in a catalogue without the pictures of hidden
    rows [R], and the share of the first ten, as they are with all pictures, that stay."""
    view = recall.live.view
    vectors = {name: np.zeros_like(looks.own[0]) for name, looks in recall.looks.items()}
    vectors[feature] = recall.looks[feature].own[row]
    query = Query(Counter(), vectors, has_text=False, has_image=True)
    scores = recall.scores(query, view)
    cosines = recall.cosines(query, view, IMAGE, TEXT)
    assert scores.image is not None
    assert cosines is not None
    image = np.where(hidden, 0, scores.image)
    return places_of(scores.image, image, np.where(image == 0, cosines, 0), row, settings)


def places_of(
    whole: Array, image: Array, told: Array, row: int, settings: SearchSettings
) -> tuple[list[int], list[float]]:
    """Gives a row's place under each weight, and the share of the first ten of `whole` [R] that stays, where
    pictures say `image` [R] and texts of items without one `told` [R]."""
    scores = Scores(image, None, image, has_text=False, told=told)
    ways = [scores.x_image(replace(settings, told_weight=weight)) for weight in WEIGHTS]
    first = _first(whole)
    return [place_of(x, row) for x in ways], [len(first & _first(x)) / len(first) for x in ways]


def _first(x: Array) -> set[int]:
    """Gives the first ten rows by x [R], ties by row."""
    return set((1 + np.argsort(-x[1:], kind="stable")[:TOP]).tolist())

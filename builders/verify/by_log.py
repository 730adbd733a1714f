"""Measures what lists are worth by what became of what the shop showed (worth.py).

Axes: Q moments, E impressions, T tasks, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from builders.data.dataset import Dataset, Impressions
from builders.data.spans import FIRST_CLOCK_S
from builders.export.verifier import Verifier
from builders.verify.off_policy import FEWEST_ROWS, examination
from builders.verify.values import Worth, blended, sampled, weights_text
from ensemble.arrays import Array
from ensemble.options import default_options
from ensemble.release.held_out import FEWEST_USERS
from ensemble.schema import Task
from ensemble.steps.recall import fused

_MOMENTS = 4000  # that are asked about
_LOOKED_AT = 500_000  # training impressions that tell how much each place is looked at
_LEAST_LOOK = 0.02  # against the first place: no row weighs more than 50
_SESSION_S = 1800  # views of a user that are no further apart are one moment, where the log has no lists


def by_log(verifier: Verifier, impressions: Impressions) -> Worth | str:
    """Measures what each way would have made of the items that were shown together."""
    tasks = verifier.dataset.schema.tasks
    whole, moments, what = _moments(impressions, tasks)
    if len(np.unique(whole.user_rows)) < FEWEST_USERS:
        return f"fewer than {FEWEST_USERS} held-out users were shown several items at one moment"
    values = blended(tasks, np.nan_to_num(whole.labels))  # a NaN: what it is given did not happen
    first = np.unique(moments, return_index=True)[1]
    scored, found = _scores(verifier, whole), {}
    looks = _looks(verifier.dataset) if whole.positions.all() else None
    times = np.minimum.reduceat(whole.times, first)
    row = (whole.user_rows[first], np.zeros(len(first), np.int64), times)
    if looks is not None:
        weights = place_weights(scored, whole.positions, moments, looks)
        if effective_rows(weights["chain"]) >= FEWEST_ROWS:
            for way, of in weights.items():
                found[way] = _shares(values * of[:, None], np.ones(len(moments), bool), moments, first)
            return Worth("places", f"logged {what}, reordered: {weights_text(tasks)}", *row, found)
    for way, scores in scored.items():
        best = np.maximum.reduceat(scores, first)[moments]
        found[way] = _shares(values, scores == best, moments, first)
    found["random"] = _shares(values, np.ones(len(moments), bool), moments, first)
    if whole.positions.all():
        place = np.minimum.reduceat(whole.positions, first)[moments]
        found["logged"] = _shares(values, whole.positions == place, moments, first)
    return Worth("replay", f"replay of {what}: {weights_text(tasks)}", *row, found)


def place_weights(
    scored: dict[str, Array], positions: Array, moments: Array, looks: Array
) -> dict[str, Array]:
    """Says how much more each item would have been looked at in each way's order: [E] each, 1 as logged.

    A moment's items take the moment's own places, the best score the first; equal scores share theirs.
    scored [E] by way, positions [E] from 1, moments [E] int64 ascending, looks [P] of each place.
    """
    logged = looks[np.minimum(positions, len(looks)) - 1]
    in_place = logged[np.lexsort((positions, moments))]  # of each moment, its places in their order
    weights = {"logged": np.ones(len(positions))}
    weights["random"] = (np.bincount(moments, logged) / np.bincount(moments))[moments] / logged
    for way, scores in scored.items():
        order = np.lexsort((-scores, moments))
        starts = np.ones(len(order), bool)
        starts[1:] = (np.diff(moments[order]) != 0) | (np.diff(scores[order]) != 0)
        tie = np.cumsum(starts) - 1
        look = np.empty(len(order))
        look[order] = (np.bincount(tie, in_place) / np.bincount(tie))[tie]
        weights[way] = look / logged
    return weights


def effective_rows(weights: Array) -> float:
    """Says how many rows of equal weight would tell as much as these [E] (Kish 1965)."""
    return float(weights.sum() ** 2 / np.maximum((weights**2).sum(), 1e-12))


def _looks(dataset: Dataset) -> Array | None:
    """Learns from the training part how much each place is looked at [P]; None where that cannot be told."""
    train, tasks = dataset.train_impressions, dataset.schema.tasks
    clicks = next((at for at, task in enumerate(tasks) if task.kind == "binary" and not task.given), None)
    if train is None or clicks is None:
        return None
    known = (train.positions > 0) & ~np.isnan(train.labels[:, clicks])
    rows = np.flatnonzero(known)
    rows = rows[sampled(len(rows), _LOOKED_AT)]
    if len(rows) < FEWEST_ROWS or train.labels[rows, clicks].sum() < FEWEST_ROWS:
        return None
    looks = examination(train.item_rows[rows], train.positions[rows], train.labels[rows, clicks])
    return np.maximum(looks, _LEAST_LOOK)


def _scores(verifier: Verifier, impressions: Impressions) -> dict[str, Array]:
    """Gives each way's score of each impression's item, at its user's moment: [E] each."""
    lists, places = verifier.impression_lists(impressions)
    recalled = fused(lists.item_rows, lists.scores, verifier.recall.settings.source_weights)
    probabilities = verifier.impression_probabilities(impressions)
    scores = lists.scores.reshape(-1, lists.scores.shape[2])[places]
    return {
        "chain": verifier.reranking.blend(default_options(1), probabilities[None], scores[None])[0],
        "recall": recalled.reshape(-1)[places],
        "popularity": verifier.popularity[impressions.item_rows],
    }


def _shares(values: Array, chosen: Array, moments: Array, first: Array) -> Array:
    """Gives the mean of values [E, 1 + T] over the chosen [E] bool of each moment [E]: ties share."""
    sums = np.add.reduceat(values * chosen[:, None], first)
    return sums / np.bincount(moments, weights=chosen)[:, None]


def _moments(impressions: Impressions, tasks: Sequence[Task]) -> tuple[Impressions, Array, str]:
    """Takes (a sample of) the impressions that stand with others of their user at one moment, in order.

    Gives them, the moment of each [E] int64 (0, 1, …), and what a moment is: a list, or a session where too
    few users have lists. All of a moment have its first history: no way knows what came in between.
    """
    order = np.lexsort((impressions.times, impressions.user_rows))
    order = order[~censored(impressions.labels, tasks)[order]]
    is_clock = bool((impressions.times > FIRST_CLOCK_S).all())
    moment, what = _grouped(impressions, order, 0), "lists"
    rows = np.flatnonzero(np.bincount(moment) > 1)
    if is_clock and len(np.unique(impressions.user_rows[order][np.isin(moment, rows)])) < FEWEST_USERS:
        moment, what = _grouped(impressions, order, _SESSION_S), "sessions"
        rows = np.flatnonzero(np.bincount(moment) > 1)
    kept = np.isin(moment, rows[sampled(len(rows), _MOMENTS)])
    _, moments = np.unique(moment[kept], return_inverse=True)
    chosen = order[kept]
    first = np.unique(moments, return_index=True)[1]
    ends = impressions.history_ends[chosen][first][moments]
    return replace(impressions.at(chosen), history_ends=ends), moments, what


def _grouped(impressions: Impressions, order: Array, gap_s: int) -> Array:
    """Numbers the moments of impressions in `order` [E]: the same user's, no further apart than `gap_s`."""
    users, times = impressions.user_rows[order], impressions.times[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (users[1:] != users[:-1]) | (np.diff(times) > gap_s)
    return np.cumsum(starts) - 1


def censored(labels: Array, tasks: Sequence[Task]) -> Array:
    """Says which rows [E] miss a label that they would have: not because what it is given did not happen."""
    place = {task.name: at for at, task in enumerate(tasks)}
    missing = np.isnan(labels)
    for at, task in enumerate(tasks):
        if task.given:
            missing[:, at] &= labels[:, place[task.given]] == 1
    return missing.any(axis=1)

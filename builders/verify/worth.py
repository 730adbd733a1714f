"""Says what the shown lists are worth: a release's first figure, of held-out users.

The worth of an item to a user is what the user does with it when it is shown, each task by its weight: clicks
and purchases by their probability, dwell after a click, as the shop's tasks say. In a generated shop the
planted truth tells it of any item (`by_truth`). In a real one only what was shown has labels (`by_log`):

  - places: the logged lists are put into each way's order, and what became of an item counts as much more as
    its new place is looked at more than its old one (the position-based model; off_policy.py);
  - replay: where no places were logged, each way chooses of the items shown to a user at one moment the one
    that it would have put first, and gets what became of it (Li et al., WSDM 2011). What the shop itself put
    first was looked at more, so this is kind to the shop's own order.

Axes: Q rows (held-out users, or moments), N items, T tasks, K places, E impressions, W seen items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, Impressions, Targets
from builders.data.spans import FIRST_CLOCK_S
from builders.export.verifier import BATCH, Verifier
from builders.ranker.lists import lists_from_impressions
from builders.shop.truth import FILE, TASKS, Truth, open_truth
from builders.verify.off_policy import FEWEST_ROWS, examination
from ensemble.arrays import Array, first_kept
from ensemble.bootstrap import groups, paired_difference, ratio, spreads, user_sums
from ensemble.options import default_options
from ensemble.release.held_out import FEWEST_USERS
from ensemble.schema import Task
from ensemble.steps.recall import fused

PLACES = 10  # of a list
_ROWS = 1000  # held-out users, or moments, that are asked about
_PAIRS = 50_000_000  # users times items whose truth is computed
_PAIRS_AT_ONCE = 4_000_000
_LOOKED_AT = 500_000  # training impressions that tell how much each place is looked at
_LEAST_LOOK = 0.02  # against the first place: no row weighs more than 50
_SESSION_S = 1800  # views of a user that are no further apart are one moment, where the log has no lists


@dataclass(frozen=True)
class Worth:
    """Holds what each way's choice was worth in each row; `values` are [Q, 1 + T]: worth, then each task."""

    kind: str  # truth | replay | places
    measure: str  # what was measured: two releases' rows are compared only where it is the same
    users: Array  # [Q] int64, user rows
    items: Array  # [Q] int64, the held-out next item; 0 where a row is a moment of the log
    times: Array  # [Q] int64
    values: dict[str, Array]  # by way

    def report(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Gives its part of a release's report."""
        chain = self.values["chain"][:, 0]
        names = ("worth", *(task.name for task in tasks))
        return {
            "kind": self.kind,
            "measure": self.measure,
            "rows": len(self.users),
            "users": len(np.unique(self.users)),
            "places": PLACES if self.kind == "truth" else 1,
            "weights": {task.name: task.weight for task in tasks},
            "ways": {
                way: dict(zip(names, map(float, of.mean(axis=0)), strict=True))
                for way, of in self.values.items()
            },
            "chain_minus": {
                way: vars(paired_difference(of[:, 0], chain, self.users))
                for way, of in self.values.items()
                if way != "chain"
            },
            "chain_times": {
                way: _times(of[:, 0], chain, self.users) for way, of in self.values.items() if way != "chain"
            },
        }


def _times(first: Array, second: Array, users: Array) -> dict[str, float]:
    """Says how many times as much the second is worth, with a 95% interval: both [Q], paired over users."""
    num_users, group = groups(users)
    above, below = (user_sums(group, of, num_users) for of in (second, first))
    [found] = spreads([ratio(above, below)], num_users)
    return {"value": found.value, "low": found.low, "high": found.high}


def worth_of(verifier: Verifier, data: Path) -> Worth | str:
    """Measures what lists are worth in the one way that the shop allows; says why, where none does.

    `data` is the folder of the stage, which has a generated shop's truth.
    """
    dataset, why = verifier.dataset, ""
    if (data / FILE).is_file():
        found = by_truth(verifier, data / FILE)
        if isinstance(found, Worth):
            return found
        why = found
    if dataset.test_impressions is None:
        return why or "the shop has no labels"
    found = by_log(verifier, dataset.test_impressions)
    return found if isinstance(found, Worth) else "; ".join(filter(None, (why, found)))


def blended(tasks: Sequence[Task], values: Array) -> Array:
    """Puts tasks' values [..., T] together: worth, then each task over the entire space, [..., 1 + T].

    A conditional task's value counts only as often as what it is given happens.
    """
    whole = np.array(values, np.float64)
    place = {task.name: at for at, task in enumerate(tasks)}
    for at, task in enumerate(tasks):  # what is given comes before
        if task.given:
            whole[..., at] *= whole[..., place[task.given]]
    weights = np.array([task.weight for task in tasks])
    return np.concatenate([(whole @ weights)[..., None], whole], axis=-1)


# --- by the planted truth


@dataclass(frozen=True)
class _Planted:
    """Holds a truth in the dataset's rows."""

    truth: Truth
    tasks: tuple[Task, ...]
    columns: list[int]  # of truth.TASKS, in the order of the schema's tasks
    users: Array  # [U + 1] int64, the generator's rows
    items: Array  # [I] int64

    def worth(self, users: Array, times: Array, *, known: bool = False) -> Array:
        """Gives the worth and each task of every item [Q, I, 1 + T] to user rows [Q] at times [Q]."""
        found = self.truth.tasks(self.users[users], times, self.items[None], known=known)
        return blended(self.tasks, found[..., self.columns])


def planted(dataset: Dataset, file: Path) -> _Planted | str:
    """Opens a truth for a dataset; says why it does not fit."""
    truth, tasks = open_truth(file), dataset.schema.tasks
    strange = [task.name for task in tasks if task.name not in TASKS]
    if strange:
        return f"the planted truth knows no task {strange[0]!r}"
    users, items = truth.rows_of(dataset.user_ids, dataset.item_ids)
    if (items < 0).any() or (users < 0).any():
        of = dataset.item_ids[items < 0] if (items < 0).any() else dataset.user_ids[users < 0]
        return f"the planted truth does not know {of[0].decode()!r}"
    columns = [TASKS.index(task.name) for task in tasks]
    return _Planted(truth, tasks, columns, np.concatenate([[-1], users]), items)


def by_truth(verifier: Verifier, file: Path) -> Worth | str:
    """Measures lists of ten by the planted truth; all ways leave out what the user has had."""
    dataset = verifier.dataset
    truth = planted(dataset, file)
    if isinstance(truth, str):
        return truth
    rows = _sampled(len(dataset.test.user_rows), min(_ROWS, max(50, _PAIRS // dataset.num_items)))
    if not len(rows):
        return "nothing was held out"
    targets = Targets(*(of[rows] for of in vars(dataset.test).values()))
    times = dataset.histories.times[targets.history_ends]
    popular = np.argsort(-verifier.popularity[1:], kind="stable") + 1
    parts = []
    for start in range(0, len(rows), BATCH):
        piece = slice(start, start + BATCH)
        answer = verifier.answer(targets.user_rows[piece], targets.history_ends[piece])
        seen = answer.tensors["seen_rows"]
        lists = {
            "chain": answer.shown[:, :PLACES],
            "recall": answer.recalled[:, :PLACES],
            "popularity": _unseen(popular[: PLACES + seen.shape[1]], seen),
        }
        parts.append(_values(truth, targets.user_rows[piece], times[piece], seen, lists))
    values = {way: np.concatenate([part[way] for part in parts]) for way in parts[0]}
    measure = f"planted truth {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}: {_weights(truth.tasks)}"
    return Worth("truth", measure, targets.user_rows, targets.item_rows, times, values)


def _values(
    truth: _Planted, users: Array, times: Array, seen: Array, lists: dict[str, Array]
) -> dict[str, Array]:
    """Gives what each way's lists [Q, K] are worth, and random, knowable and best ones: [Q, 1 + T] each."""
    at_once = max(1, _PAIRS_AT_ONCE // len(truth.items))
    parts = []
    for start in range(0, len(users), at_once):
        piece = slice(start, start + at_once)
        worth = truth.worth(users[piece], times[piece])
        known = truth.worth(users[piece], times[piece], known=True)[..., 0]
        is_new = np.ones((len(worth), len(truth.items) + 1), bool)
        np.put_along_axis(is_new, np.maximum(seen[piece], 0), False, axis=1)
        is_new = is_new[:, 1:]
        found = {way: _mean_of(worth, rows[piece]) for way, rows in lists.items()}
        found["random"] = np.einsum("qit,qi->qt", worth, is_new) / np.maximum(is_new.sum(1), 1)[:, None]
        for way, by in (("knowable", known), ("best", worth[..., 0])):
            found[way] = _mean_of(worth, _best(np.where(is_new, by, -np.inf)))
        parts.append(found)
    return {way: np.concatenate([part[way] for part in parts]) for way in parts[0]}


def _mean_of(worth: Array, rows: Array) -> Array:
    """Gives the mean over the places of lists [Q, K] of item rows; an empty place (-1) is worth nothing."""
    at = np.take_along_axis(worth, np.maximum(rows - 1, 0)[..., None], axis=1)
    return (at * (rows > 0)[..., None]).sum(axis=1) / PLACES


def _best(scores: Array) -> Array:
    """Gives the item rows of the greatest scores [Q, I]: [Q, K], in any order, -1 where the score is -inf."""
    count = min(PLACES, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.where(np.isfinite(np.take_along_axis(scores, best, axis=1)), best + 1, -1)


def _unseen(order: Array, seen: Array) -> Array:
    """Gives the first K of `order` [n] that each user has not had: [Q, K], padded with -1."""
    keys = np.arange(len(seen))[:, None] << 40
    had = np.isin(keys + order, keys + np.maximum(seen, 0))
    return first_kept(np.where(had, -1, order), PLACES)


def knowable_figures(
    dataset: Dataset, data: Path, score: Callable[[Array, Array], float]
) -> dict[str, float]:
    """Gives a figure (AUC) of each binary task on the test impressions for who knew all that can be known.

    `data` as in worth_of; nothing where the shop was not generated.
    """
    impressions, file = dataset.test_impressions, data / FILE
    truth = planted(dataset, file) if file.is_file() else "it was not generated"
    if isinstance(truth, str) or impressions is None:
        return {}
    positions = impressions.positions[:, None]
    users, items = truth.users[impressions.user_rows], truth.items[impressions.item_rows - 1]
    found = truth.truth.tasks(users, impressions.times, items[:, None], positions, known=True)[:, 0]
    return {
        task.name: score(impressions.labels[:, at], found[:, truth.columns[at]])
        for at, task in enumerate(truth.tasks)
        if task.kind == "binary"
    }


# --- by the log


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
            return Worth("places", f"logged {what}, reordered: {_weights(tasks)}", *row, found)
    for way, scores in scored.items():
        best = np.maximum.reduceat(scores, first)[moments]
        found[way] = _shares(values, scores == best, moments, first)
    found["random"] = _shares(values, np.ones(len(moments), bool), moments, first)
    if whole.positions.all():
        place = np.minimum.reduceat(whole.positions, first)[moments]
        found["logged"] = _shares(values, whole.positions == place, moments, first)
    return Worth("replay", f"replay of {what}: {_weights(tasks)}", *row, found)


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
    rows = rows[_sampled(len(rows), _LOOKED_AT)]
    if len(rows) < FEWEST_ROWS or train.labels[rows, clicks].sum() < FEWEST_ROWS:
        return None
    looks = examination(train.item_rows[rows], train.positions[rows], train.labels[rows, clicks])
    return np.maximum(looks, _LEAST_LOOK)


def _scores(verifier: Verifier, impressions: Impressions) -> dict[str, Array]:
    """Gives each way's score of each impression's item, at its user's moment: [E] each."""
    lists, places = lists_from_impressions(impressions, verifier.offline.scores)
    recalled = fused(lists.item_rows, lists.scores, verifier.recall.settings.source_weights)
    probabilities = verifier.impression_probabilities(impressions)
    return {
        "chain": verifier.reranking.blend(default_options(1), probabilities[None])[0],
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
    order = order[~_censored(impressions.labels, tasks)[order]]
    is_clock = bool((impressions.times > FIRST_CLOCK_S).all())
    moment, what = _grouped(impressions, order, 0), "lists"
    rows = np.flatnonzero(np.bincount(moment) > 1)
    if is_clock and len(np.unique(impressions.user_rows[order][np.isin(moment, rows)])) < FEWEST_USERS:
        moment, what = _grouped(impressions, order, _SESSION_S), "sessions"
        rows = np.flatnonzero(np.bincount(moment) > 1)
    kept = np.isin(moment, rows[_sampled(len(rows), _ROWS * 4)])
    _, moments = np.unique(moment[kept], return_inverse=True)
    chosen = order[kept]
    first = np.unique(moments, return_index=True)[1]
    ends = impressions.history_ends[chosen][first][moments]
    return _taken(impressions, chosen, ends), moments, what


def _grouped(impressions: Impressions, order: Array, gap_s: int) -> Array:
    """Numbers the moments of impressions in `order` [E]: the same user's, no further apart than `gap_s`."""
    users, times = impressions.user_rows[order], impressions.times[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (users[1:] != users[:-1]) | (np.diff(times) > gap_s)
    return np.cumsum(starts) - 1


def _censored(labels: Array, tasks: Sequence[Task]) -> Array:
    """Says which rows [E] miss a label that they would have: not because what it is given did not happen."""
    place = {task.name: at for at, task in enumerate(tasks)}
    missing = np.isnan(labels)
    for at, task in enumerate(tasks):
        if task.given:
            missing[:, at] &= labels[:, place[task.given]] == 1
    return missing.any(axis=1)


def _taken(impressions: Impressions, rows: Array, ends: Array) -> Impressions:
    """Gives the impressions at `rows` with other history ends."""
    parts = {name: of[rows] for name, of in vars(impressions).items() if of is not None}
    return replace(Impressions(**parts), history_ends=ends)


def _sampled(count: int, most: int) -> Array:
    """Draws at most `most` of `count` places, the same each time, in their order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def _weights(tasks: Sequence[Task]) -> str:
    """Writes what a worth is made of: "1 ctr + 1 cvr + 0.1 dwell"."""
    return " + ".join(f"{task.weight:g} {task.name}" for task in tasks)

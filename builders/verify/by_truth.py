"""Measures what lists are worth by the planted truth of a generated shop (worth.py).

Axes: Q rows (held-out users), N items, I all items, T tasks, K places, W seen items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, Targets
from builders.export.verifier import BATCH, Verifier
from builders.shop.truth import FILE, TASKS, Truth, open_truth
from builders.verify.values import PLACES, Worth, blended, sampled, weights_text
from ensemble.arrays import Array, first_kept
from ensemble.schema import Task

_ROWS = 1000  # held-out users that are asked about
_PAIRS = 50_000_000  # users times items whose truth is computed
_PAIRS_AT_ONCE = 4_000_000


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
    if not dataset.schema.has_clock:
        return "the planted truth is of days, and this shop's times are no clock but places in order"
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
    targets = asked_targets(dataset)
    if not len(targets.user_rows):
        return "nothing was held out"
    times = dataset.histories.times[targets.history_ends]
    popular = np.argsort(-verifier.popularity[1:], kind="stable") + 1
    parts = []
    for start in range(0, len(targets.user_rows), BATCH):
        piece = slice(start, start + BATCH)
        answer = verifier.answer(targets.user_rows[piece], targets.history_ends[piece])
        seen = answer.had
        lists = {
            "chain": answer.shown[:, :PLACES],
            "recall": answer.recalled[:, :PLACES],
            "popularity": unseen(popular[: PLACES + seen.shape[1]], seen),
        }
        parts.append(values_of(truth, targets.user_rows[piece], times[piece], seen, lists))
    values = {way: np.concatenate([part[way] for part in parts]) for way in parts[0]}
    measure = (
        f"planted truth {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}: {weights_text(truth.tasks)}"
    )
    return Worth("truth", measure, targets.user_rows, targets.item_rows, times, values)


def asked_targets(dataset: Dataset) -> Targets:
    """Gives the held-out targets that the truth is asked about, the same each time: fewer of a large
    catalogue."""
    most = min(_ROWS, max(50, _PAIRS // dataset.num_items))
    rows = sampled(len(dataset.test.user_rows), most)
    return Targets(*(of[rows] for of in vars(dataset.test).values()))


def values_of(
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


def unseen(order: Array, seen: Array) -> Array:
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

"""Compares ways to answer a new user's first clicks: the session path, a meta-learned start, simple ones.

    python -m builders.bench.first_clicks SHOP --out DIR [--preset base] [--set NAME=VALUE …] [--seed 0]
        [--updates 600] [--keep]

DIR gets the stages data, encoders and index of SHOP's build, anew but with --keep. SHOP's split must leave
out whole users (time, random, column, files): nothing of those who are asked was learned. Settings of the
meta-learned start and the shares in which it is mixed are chosen by the validation users of whom nothing was
learned, all else by the test's users. Printed, as JSON: what was tried, HR@10 of the next new item after one
to five clicks by each way, full ranking, and differences by a paired bootstrap over users.

Ways: `session` is the user encoder; `recall` the order of all sources; `meta` the start of meta_start.py;
`session + meta` adds both scores of every item; `recall + meta` has meta as one more source: its best 64
items stand among the candidates, and its score among the sources'. Axes: Q targets, N candidates, I items.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.bench.meta_start import UPDATES, Learned, Tasks, learn
from builders.bench.recall_stages import recall_parser, recall_stages
from builders.data.dataset import Dataset, Targets, history_windows, open_dataset, training_histories
from builders.export.verifier import all_had, knn_scores, rank_unseen
from builders.index.offline import OfflineRecall
from builders.index.stage import open_recall
from builders.settings import named_preset
from builders.verify.first_clicks import CLICKS, new_users, next_new
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.steps.recall import fused
from ensemble.steps.sources import Popular

_BATCH, _OFFERED, _FEWEST = 128, 64, 30
_MOST = 4000  # targets that choose
_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_TRIED = ((1, 1), (3, 1), (5, 1), (1, 32), (3, 32), (5, 32))  # steps, groups
_PAIRS = (
    ("session", "meta"),
    ("session", "session + meta"),
    ("recall", "meta"),
    ("recall", "recall + meta"),
    ("recall", "session"),
    ("transition_knn", "meta"),
)


@dataclass(frozen=True)
class Asked:
    """Holds new users' targets, and how many clicks of each are known [Q]."""

    targets: Targets
    clicks: Array

    def some(self) -> Asked:
        """Gives at most _MOST of them, always the same ones."""
        rows = np.sort(np.random.default_rng(0).permutation(len(self.clicks))[:_MOST])
        of = self.targets
        some = Targets(of.user_rows[rows], of.history_ends[rows], of.item_rows[rows])
        return Asked(some, self.clicks[rows])

    def pieces(self) -> list[slice]:
        """Gives the slices that are asked about at once."""
        return [slice(at, at + _BATCH) for at in range(0, len(self.clicks), _BATCH)]


def asked_of(dataset: Dataset, users: Array, ends: Array | None = None) -> Asked:
    """Gives the targets of users [U + 1] bool after each number of clicks, before `ends` [U + 1]."""
    parts = [next_new(dataset, users, clicks, ends) for clicks in CLICKS]
    columns = zip(*((of.user_rows, of.history_ends, of.item_rows) for of in parts), strict=True)
    targets = Targets(*(np.concatenate(column) for column in columns))
    return Asked(targets, targets.history_ends - dataset.histories.offsets[targets.user_rows])


def tasks_of(dataset: Dataset, asked: Asked) -> Tasks:
    """Gives the same as the meta-learned start reads them: the first clicks, and what came next."""
    of = asked.targets
    return Tasks(history_windows(dataset.histories, of.user_rows, of.history_ends, CLICKS[-1]), of.item_rows)


class Ways:
    """Ranks targets by every way but those that are mixed, and by those once their weights are known."""

    def __init__(self, dataset: Dataset, offline: OfflineRecall, embeddings: Array, meta: Learned) -> None:
        self.dataset, self.offline, self.embeddings, self.meta = dataset, offline, embeddings, meta
        self.popularity = offline.recall.source(Popular).popularity

    def ranks(self, asked: Asked, weights: Mapping[str, tuple[float, ...]]) -> dict[str, Array]:
        """Gives {way: ranks [Q]}; a mixed way has a key for each of its weights: "recall + 0.5 meta"."""
        parts = [self._ranks(asked, piece, weights) for piece in asked.pieces()]
        return {way: np.concatenate([part[way] for part in parts]) for way in parts[0]}

    def _ranks(
        self, asked: Asked, piece: slice, weights: Mapping[str, tuple[float, ...]]
    ) -> dict[str, Array]:
        of, seen = asked.targets, self.offline.recall.sizes.seen
        users, ends, wanted = of.user_rows[piece], of.history_ends[piece], of.item_rows[piece]
        had = all_had(self.dataset.histories, users, ends, seen)
        query = self.offline.encode_users(users, ends)
        session = np.matmul(self.embeddings, query.transpose(0, 2, 1)).max(axis=2)
        clicks = history_windows(self.dataset.histories, users, ends, CLICKS[-1])
        meta = self.meta.users(clicks) @ self.embeddings.T
        rows = self.offline.candidates_for(query, users, ends)[0]
        ranks = {
            "session": rank_unseen(session, had, wanted),
            "recall": metrics.ranks_from_lists(rows, wanted),
            "meta": rank_unseen(meta, had, wanted),
            "popularity": rank_unseen(np.tile(self.popularity, (len(users), 1)), had, wanted),
            "transition_knn": rank_unseen(knn_scores(self.offline.recall, had[:, -seen:]), had, wanted),
        }
        for weight in weights["session"]:
            ranks[f"session + {weight} meta"] = rank_unseen(session + weight * meta, had, wanted)
        both = _with_best(rows, meta, had)
        plain = fused(
            both, self.offline.scores(users, ends, both), self.offline.recall.settings.source_weights
        )
        column = _columns(both, wanted)
        own = np.take_along_axis(meta, np.maximum(both, 0), axis=1)
        for weight in weights["recall"]:
            ranks[f"recall + {weight} meta"] = metrics.ranks_from_scores(plain + weight * own, column)
        return ranks


def _with_best(rows: Array, scores: Array, had: Array) -> Array:
    """Adds to candidates [Q, N] the best new items by scores [Q, I + 1] that are not among them, -1 where
    they are: [Q, N + 64]."""
    scores = scores.copy()
    scores[:, 0] = -np.inf
    for taken in (rows, had):
        lines, columns = np.nonzero(taken > 0)
        scores[lines, taken[lines, columns]] = -np.inf
    count = min(_OFFERED, scores.shape[1] - 1)
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    best = np.where(np.isfinite(np.take_along_axis(scores, best, axis=1)), best, -1)
    return np.concatenate([rows, best], axis=1)


def _columns(rows: Array, wanted: Array) -> Array:
    """Says where in rows [Q, N] the items [Q] stand: [Q] int64, -1 where they do not."""
    is_there = rows == wanted[:, None]
    return np.where(is_there.any(axis=1), is_there.argmax(axis=1), -1)


def compare(folders: Mapping[str, Path], seed: int, updates: int = UPDATES) -> dict[str, Any]:
    """Trains the starts, chooses by validation users, and asks about the test's users: a report."""
    dataset = open_dataset(folders["data"])
    offline, embeddings = open_recall(dict(folders), dataset)
    embeddings = np.asarray(embeddings)
    past, chooses, test = groups(dataset)
    tasks, tried = tasks_of(dataset, past), dict[str, Any]()
    counts = np.bincount(training_histories(dataset)[1], minlength=dataset.num_items + 1)
    best, best_value = None, -1.0
    for steps, num_groups in _TRIED:
        began = time.process_time()
        sizes = {"steps": steps, "groups": num_groups}
        meta = learn(embeddings, counts, tasks, **sizes, seed=seed, updates=updates)
        value = metrics.ndcg(_alone(dataset, meta, embeddings, chooses), 10)
        tried[f"steps {steps}, starts {num_groups}"] = {
            "ndcg@10": round(value, 4),
            "losses": [round(loss, 3) for loss in meta.losses],
            "cpu_seconds": round(time.process_time() - began),
        }
        best, best_value = (meta, value) if value > best_value else (best, best_value)
    assert best is not None
    ways = Ways(dataset, offline, embeddings, best)
    weights = _best_weights(ways, chooses)
    ranks = ways.ranks(test, {name: (weight,) for name, weight in weights.items()})
    renamed = {way if " meta" not in way else f"{way.split(' ')[0]} + meta": of for way, of in ranks.items()}
    return {
        "tried": tried,
        "weights": weights,
        "tasks": {"past": len(past.clicks), "choose": len(chooses.clicks), "test": len(test.clicks)},
        **_figures(test, renamed),
    }


def groups(dataset: Dataset) -> tuple[Asked, Asked, Asked]:
    """Gives past users, whose first clicks train; new ones that choose; and new ones that are asked."""
    new = new_users(dataset)
    chooses = np.isin(np.arange(len(new)), dataset.validation.user_rows)
    past = asked_of(dataset, ~new, dataset.train_ends)
    groups = past, asked_of(dataset, new & chooses).some(), asked_of(dataset, new & ~chooses)
    if min(len(group.clicks) for group in groups) < _FEWEST:
        raise InvalidInput(
            f"{dataset.schema.shop}: the split leaves out {int(new[1:].sum())} whole users, too few to ask",
            'write split = {kind = "random", validation = 0.1, test = 0.2} into shop.toml',
        )
    return groups


def _alone(dataset: Dataset, meta: Learned, embeddings: Array, asked: Asked) -> Array:
    """Ranks the targets by the meta-learned start: [Q]."""
    tasks, of, parts = tasks_of(dataset, asked), asked.targets, []
    for piece in asked.pieces():
        scores = meta.users(tasks.clicks[piece]) @ embeddings.T
        parts.append(rank_unseen(scores, np.asarray(tasks.clicks[piece]), of.item_rows[piece]))
    return np.concatenate(parts)


def _best_weights(ways: Ways, chooses: Asked) -> dict[str, float]:
    """Chooses meta's weight beside each way by NDCG@10 over all numbers of clicks."""
    ranks = ways.ranks(chooses, {"session": _WEIGHTS, "recall": _WEIGHTS})

    def value(name: str, weight: float) -> float:
        return metrics.ndcg(ranks[f"{name} + {weight} meta"], 10)

    return {name: max(_WEIGHTS, key=lambda weight: value(name, weight)) for name in ("session", "recall")}


def _figures(asked: Asked, ranks: Mapping[str, Array]) -> dict[str, Any]:
    """Gives HR@10 of each way after each number of clicks and all together, and differences."""
    told: dict[str, Any] = {"hr@10": {}, "ndcg@10": {}, "differences": {}}
    for name, chosen in {"all": asked.clicks > 0, **{str(n): asked.clicks == n for n in CLICKS}}.items():
        users = asked.targets.user_rows[chosen]
        count = {"targets": len(users), "users": len(np.unique(users))}
        told["hr@10"][name] = count | {w: round(metrics.hit_rate(r[chosen], 10), 4) for w, r in ranks.items()}
        told["ndcg@10"][name] = {w: round(metrics.ndcg(r[chosen], 10), 4) for w, r in ranks.items()}
        hits = {way: metrics.hits(r[chosen], 10) for way, r in ranks.items()}
        told["differences"][name] = {
            f"{second} minus {first}": str(paired_difference(hits[first], hits[second], users))
            for first, second in _PAIRS
        }
    return told


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares, and prints JSON."""
    parser = recall_parser(__doc__)
    parser.add_argument("--updates", type=int, default=UPDATES, help="of the meta-learned start")
    parser.add_argument("--keep", action="store_true", help="take the encoders that DIR has")
    given = parser.parse_args(arguments)
    try:
        chosen = named_preset(given.preset, given.changes)
        folders = recall_stages(given.shop, given.out, chosen, given.seed, keep_encoders=given.keep)
        print(json_text(compare(folders, given.seed, given.updates), indent=1))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

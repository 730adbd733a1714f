"""Says what a graph adds to recall: today's sources, walks of two steps, a graph network.

    python -m builders.bench.graph_source SHOP --out DIR [--preset base] [--set NAME=VALUE …] [--seed 0]
        [--updates 500] [--starts encoders,random] [--keep]

DIR gets the stages data, encoders and index of SHOP's build, anew but with --keep; its shop.toml must name
the source `walks`. Weights are fitted on (a sample of) the validation targets, figures are of the test's. A
graph network's best 32 items take the places of the candidates that are last in recall's order, as walks have
32 places of their own, and its score is one more among the sources'; beside it stands what 32 more of the
user encoder's best would do there. (What comes last there is said by all sources weighing 1.) Printed, as
JSON: recall@N and NDCG@10 in the order of all scores, and differences by a paired bootstrap over users, for
all targets and for those that cross categories: items that share no attribute with the last item taken, or
with none of the past.
Attributes that more than a fifth of all items have tell nothing and are left out.

Axes: Q targets, N candidates, S sources, I items, C code columns.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders import metrics
from builders.bench.graph_network import Events, GraphScores, learn, random_start
from builders.bench.recall_stages import recall_parser, recall_stages
from builders.data.dataset import Dataset, Targets, history_windows, open_dataset, training_histories
from builders.encoders.sequences import Sequences
from builders.index.offline import OfflineRecall
from builders.index.stage import open_recall
from builders.settings import named_preset
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.steps.recall import fused

_MOST_FITTED, _MOST, _BATCH, _PLACES, _COMMON = 2000, 4000, 256, 32, 0.2
_FEWEST = 30  # targets of a figure
_WEIGHTS: dict[str, tuple[float, ...]] = {
    "user_embeddings": (1.0,),
    "transitions": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "popular": (0.0, 0.2, 0.4),
    "walks": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
    "graph network": (0.0, 0.125, 0.25, 0.5, 1.0, 2.0),
}


# users [Q], history_ends [Q], what they had [Q, *] -> scores [Q, I + 1]
Scores = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class Found:
    """Holds candidates [Q, N], their scores [Q, N, S], and where the wanted item stands [Q], -1: nowhere."""

    rows: Array
    scores: Array
    column: Array

    def gains(self, weights: tuple[float, ...]) -> Array:
        """Gives each target's NDCG@10 [Q] in the order of the weighed scores."""
        ranks = metrics.ranks_from_scores(fused(self.rows, self.scores, weights), self.column)
        return metrics.gains(ranks, 10)

    def best(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """Finds the weights of the sources `names` with the best NDCG@10."""
        grid = list(itertools.product(*(_WEIGHTS[name] for name in names)))
        return grid[int(np.argmax([float(self.gains(weights).mean()) for weights in grid]))]


class Asking:
    """Asks recall with some of its sources, and a graph network's scores beside."""

    def __init__(self, dataset: Dataset, folders: Mapping[str, Path]) -> None:
        self.dataset, self.folders = dataset, folders
        self.names = dataset.schema.source_names
        self.kept: dict[tuple[int, tuple[str, ...]], tuple[OfflineRecall, tuple[Array, Array]]] = {}

    def recall(self, off: tuple[str, ...]) -> OfflineRecall:
        """Opens the built recall without the sources that are `off`; all that are on weigh 1."""
        weights = tuple(0.0 if name in off else 1.0 for name in self.names)
        path = self.folders["index"] / "recall.json"
        before = path.read_text()
        offline, _ = open_recall(self.folders, self.dataset)
        changed: dict[str, Any] = {"off": off, "source_weights": weights}
        settings = dataclasses.replace(offline.recall.settings, **changed)
        try:
            path.write_text(settings.to_json())
            return open_recall(self.folders, self.dataset)[0]
        finally:
            path.write_text(before)

    def found(self, targets: Targets, off: tuple[str, ...], graph: Scores | None = None) -> Found:
        """Gives what recall finds about the targets, with the graph network's items and scores at the end."""
        key = (id(targets), off)
        if key not in self.kept:
            offline = self.recall(off)
            self.kept[key] = offline, offline.candidates(targets.user_rows, targets.history_ends)
        offline, (rows, scores) = self.kept[key]
        if graph is not None:
            pieces = [slice(at, at + _BATCH) for at in range(0, len(rows), _BATCH)]
            parts = [self._with_graph(offline, targets, rows, piece, graph) for piece in pieces]
            rows, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        is_there = rows == targets.item_rows[:, None]
        return Found(rows, scores, np.where(is_there.any(axis=1), is_there.argmax(axis=1), -1))

    def _with_graph(
        self, offline: OfflineRecall, targets: Targets, candidates: Array, piece: slice, graph: Scores
    ) -> tuple[Array, Array]:
        users, ends = targets.user_rows[piece], targets.history_ends[piece]
        had = history_windows(self.dataset.histories, users, ends, offline.recall.sizes.seen)
        own = graph(users, ends, had)
        rows = with_best(candidates[piece], own, had)
        more = np.take_along_axis(own, np.maximum(rows, 0), axis=1)[..., None]
        return rows, np.concatenate([offline.scores(users, ends, rows), more], axis=2)


def with_best(rows: Array, scores: Array, had: Array) -> Array:
    """Puts the best new items by scores [Q, I + 1] in the last 32 places of candidates [Q, N], which come
    best first; an item that stands before is not put there again."""
    kept, scores = rows[:, :-_PLACES], scores.copy()
    scores[:, 0] = -np.inf
    for taken in (kept, had):
        lines, columns = np.nonzero(taken > 0)
        scores[lines, taken[lines, columns]] = -np.inf
    best = np.argpartition(-scores, _PLACES - 1, axis=1)[:, :_PLACES]
    best = np.where(np.isfinite(np.take_along_axis(scores, best, axis=1)), best, -1)
    return np.concatenate([kept, best], axis=1)


def crossing(dataset: Dataset, targets: Targets) -> dict[str, Array]:
    """Says which targets [Q] share no attribute with the last item, and which with none of the past."""
    columns = [
        at
        for f in dataset.schema.items.features
        if f.kind == "category"
        for at in range(f.start, f.start + f.width)
    ]
    everybody = {"all": np.ones(len(targets.item_rows), bool)}
    if not columns:
        return everybody
    codes = np.asarray(dataset.item_codes[:, columns])
    held = np.zeros(int(codes.max()) + 1, np.int64)
    for column in codes.T:  # an item has a value once, in one of its columns
        held += np.bincount(column, minlength=len(held))
    codes = np.where((codes > 0) & (held[codes] <= _COMMON * dataset.num_items), codes, 0)
    pasts = history_windows(dataset.histories, targets.user_rows, targets.history_ends, 50)
    last, whole = (np.zeros(len(pasts), bool) for _ in range(2))
    for row, (past, wanted) in enumerate(zip(pasts, targets.item_rows, strict=True)):
        own = codes[wanted][codes[wanted] > 0]
        last[row] = bool(len(own)) and not np.isin(own, codes[past[-1]]).any()
        whole[row] = bool(len(own)) and not np.isin(own, codes[past[past > 0]]).any()
    return everybody | {"unlike the last item": last, "unlike all of the past": whole}


def compare(folders: Mapping[str, Path], starts: Sequence[str], seed: int, updates: int) -> dict[str, Any]:
    """Fits on validation targets, and asks about the test's: a report."""
    dataset = open_dataset(folders["data"])
    if "walks" not in dataset.schema.source_names:
        raise InvalidInput(
            f"{dataset.schema.shop} has no source walks",
            'add to shop.toml: [recall] sources = ["user_embeddings", "transitions", "popular", "walks"]',
        )
    asking = Asking(dataset, folders)
    fits, test = some(dataset.validation, _MOST_FITTED), some(dataset.test, _MOST)
    graphs, losses = _graphs(dataset, folders, starts, seed, updates)
    more: dict[str, Scores] = {"user encoder's 32 more": _user_encoder(dataset, folders)}
    more |= {f"network, {start} start": _by_past(graph) for start, graph in graphs.items()}
    ways: dict[str, tuple[tuple[str, ...], Scores | None]] = {
        "today": (("walks",), None),
        "walks": ((), None),
        **{way: (("walks",), of) for way, of in more.items()},
        **{f"walks and {way}": ((), of) for way, of in more.items() if way.startswith("network")},
    }
    told: dict[str, Any] = {"losses": losses, "ways": {}}
    found: dict[str, tuple[Array, Array]] = {}
    for way, (off, graph) in ways.items():
        names = tuple(name for name in asking.names if name not in off)
        fitted, of = (_on(asking.found(part, off, graph), asking.names, off) for part in (fits, test))
        weights = fitted.best((*names, *(("graph network",) if graph is not None else ())))
        told["ways"][way] = {
            "weights": weights,
            "validation ndcg@10": round(float(fitted.gains(weights).mean()), 4),
        }
        found[way] = (of.column >= 0).astype(np.float64), of.gains(weights)
    return told | {"test": _figures(crossing(dataset, test), test.user_rows, found)}


def _on(found: Found, names: Sequence[str], off: Sequence[str]) -> Found:
    """Leaves out the scores of the sources that are off."""
    kept = [at for at in range(found.scores.shape[2]) if at >= len(names) or names[at] not in off]
    return dataclasses.replace(found, scores=found.scores[:, :, kept])


def _user_encoder(dataset: Dataset, folders: Mapping[str, Path]) -> Scores:
    """Gives the user encoder's scores of all items."""
    offline, embeddings = open_recall(folders, dataset)

    def scores(users: Array, ends: Array, had: Array) -> Array:
        query = offline.encode_users(users, ends)
        return np.asarray(np.matmul(embeddings, query.transpose(0, 2, 1)).max(axis=2))

    return scores


def _by_past(graph: GraphScores) -> Scores:
    return lambda users, ends, had: graph(had)


def _graphs(
    dataset: Dataset, folders: Mapping[str, Path], starts: Sequence[str], seed: int, updates: int
) -> tuple[dict[str, GraphScores], dict[str, list[float]]]:
    """Trains a network from each start; gives them, and their losses."""
    embeddings = np.load(folders["index"] / "item_embeddings.npy")
    of_start = {"encoders": embeddings, "random": random_start(dataset.num_items, embeddings.shape[1], seed)}
    events = events_of(dataset)
    learned = {name: learn(events, of_start[name], seed=seed, updates=updates) for name in starts}
    return {name: of[0] for name, of in learned.items()}, {name: of[1] for name, of in learned.items()}


def events_of(dataset: Dataset) -> Events:
    """Gives the training events, with their times where the shop has a clock."""
    offsets, rows = training_histories(dataset)
    if not dataset.schema.has_clock:
        return Events(Sequences(offsets, rows), None)
    begins = dataset.histories.offsets[:-1]
    places = np.repeat(begins - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
    return Events(Sequences(offsets, rows), np.asarray(dataset.histories.times[places]))


def some(targets: Targets, most: int) -> Targets:
    """Gives at most so many targets, always the same ones."""
    rows = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:most])
    return Targets(targets.user_rows[rows], targets.history_ends[rows], targets.item_rows[rows])


def _figures(
    kinds: Mapping[str, Array], users: Array, found: Mapping[str, tuple[Array, Array]]
) -> dict[str, Any]:
    """Gives each way's figures of each kind of targets, and what it has more than today's sources."""
    told: dict[str, Any] = {}
    for kind, chosen in kinds.items():
        told[kind] = {"targets": int(chosen.sum())}
        if chosen.sum() < _FEWEST:
            continue
        for way, values in found.items():
            told[kind][way] = {}
            for figure, of, today in zip(("recall", "ndcg@10"), values, found["today"], strict=True):
                gain = paired_difference(today[chosen], of[chosen], users[chosen])
                told[kind][way][figure] = f"{of[chosen].mean():.4f}, {gain}"
    return told


def main(arguments: list[str] | None = None) -> None:
    """Trains, compares, and prints JSON."""
    parser = recall_parser(__doc__)
    parser.add_argument("--updates", type=int, default=500, help="of the graph network")
    parser.add_argument("--starts", default="encoders,random", help="of the graph network")
    parser.add_argument("--keep", action="store_true", help="take the encoders that DIR has")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        chosen = named_preset(given.preset, given.changes)
        folders = recall_stages(given.shop, given.out, chosen, given.seed, keep_encoders=given.keep)
        print(json_text(compare(folders, given.starts.split(","), given.seed, given.updates), indent=1))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Asks a staged release about held-out users: what is measured are the steps and engines that will serve."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from builders import metrics
from builders.data.dataset import (
    Dataset,
    Histories,
    Impressions,
    Targets,
    history_windows,
    moments,
    past_windows,
)
from builders.index.offline import OfflineRecall
from builders.index.snapshot import older_pasts
from builders.index.staged import StagedRelease
from builders.ranker.lists import Lists, lists_from_impressions, states_of
from builders.ranker.positions import place_facts, read_positions
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.engines import open_engine
from ensemble.options import default_options
from ensemble.release.pasts import MOST
from ensemble.release.snapshot import gather
from ensemble.steps.features import FeatureLookup
from ensemble.steps.recall import Recall
from ensemble.steps.reranking import Reranking
from ensemble.steps.sources import Popular, Transitions

BATCH = 64
_AT_ONCE = 1024  # whole pasts
EVERY_USER_BELOW = 100_000  # items; above, ranking the whole catalogue is only done for a sample of users
SAMPLE = 2000


@dataclass(frozen=True)
class Answer:
    """Holds what the chain answers a batch of users, and what it made it of."""

    tensors: Tensors  # the features step's
    had: Array  # [B, *] int64, all that the users have had, padded with -1
    query: Array  # [B, M, D] float32, the users' embeddings
    recalled: Array  # [B, N] int64, the candidates in recall's order, padded with -1
    shown: Array  # [B, N] int64, the same candidates in the order in which they are shown


@dataclass(frozen=True)
class Scored:
    """Holds a batch of users' candidates with the score that sorts their lists."""

    tensors: Tensors  # the features step's
    query: Array  # [B, M, D] float32, the users' embeddings
    found: Tensors  # recall's
    blended: Array  # [B, N] float32, -inf where padded

    @property
    def shown(self) -> Array:
        """Gives the candidates [B, N] in the order in which they are shown, ties by row."""
        rows = self.found["candidate_rows"]
        return np.take_along_axis(rows, np.lexsort((rows, -self.blended), axis=-1), axis=1)


class Runs(Protocol):
    """Runs a model: arrays by name into arrays by name."""

    def run(self, feeds: Tensors) -> Tensors:
        """Turns the model's inputs into its outputs; the first axis is the batch."""
        ...


class Verifier:
    """Opens a staged release and asks it about the past."""

    def __init__(self, dataset: Dataset, folder: Path, engines: Mapping[str, Runs] | None = None) -> None:
        """Opens the staged release in `folder`; `engines` by model, where its own are not exported."""
        staged = StagedRelease(folder)
        self.dataset, self.sizes = dataset, dataset.schema.sizes
        self.features = FeatureLookup(staged.model("features"), staged)
        self.user_encoder, self.ranker = (
            engines[name] if engines else open_engine(staged.member_file(name, "model.onnx"))
            for name in ("user_encoder", "ranker")
        )
        self.offline = OfflineRecall(dataset, folder, self.encode_users)
        self.recall = self.offline.recall
        self.popularity = self.recall.source(Popular).popularity
        self.reranking = Reranking(staged.model("reranking"), staged)
        self.embeddings = np.ascontiguousarray(staged.items["embedding"])
        self.positions = read_positions(folder)

    def user_tensors(
        self,
        user_rows: Array,
        history_ends: Array,
        times: Array | None = None,
        contexts: Array | None = None,
    ) -> Tensors:
        """Gives the features step's tensors and the history's cells, as they were at `history_ends`;
        user_state is that of `times` [L], by default of each user's next event (data/dataset.py: moments),
        and of contexts [L, X], by default none."""
        histories = self.dataset.histories
        past = past_windows(histories, user_rows, history_ends, self.sizes.seen)
        times = moments(histories, user_rows, history_ends) if times is None else times
        rows = self.features.users[user_rows]
        own = {
            name: np.ascontiguousarray(rows[name.removeprefix("user_")])
            for name in ("user_codes", "user_values", "user_features")
        }
        return {
            **self.features.past_tensors(past, np.asarray(times, np.float64), rows["rates"], contexts),
            **self.features.history_of(past),
            "history_cells": self.features.cells(past),
            **own,
            "user_status": np.zeros((len(user_rows), 1), np.int64),
        }

    def encode_users(self, user_rows: Array, history_ends: Array) -> Array:
        """Encodes users [L] at history_ends [L] by the engine: user_embeddings [L, M, D]."""
        parts = [np.zeros((0, self.sizes.interests, self.sizes.embedding), np.float32)]
        for start in range(0, len(user_rows), BATCH):
            tensors = self.user_tensors(user_rows[start : start + BATCH], history_ends[start : start + BATCH])
            parts.append(self._encode(tensors))
        return np.concatenate(parts)

    def _encode(self, tensors: Tensors) -> Array:
        return self.user_encoder.run({name: tensors[name] for name in contract.USER_ENCODER_INPUTS})[
            "user_embeddings"
        ]

    def ranks(
        self, targets: Targets, progress: Any = None, *, chain_only: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Ranks (a sample of) the targets, two batches at once: user rows [Q], {way: ranks [Q]}.

        chain_only leaves out all ways but those of what is served.
        """
        targets = self.sampled(targets)
        places = np.arange(len(targets.user_rows))
        pieces = [places[start : start + BATCH] for start in range(0, len(places), BATCH)]
        with ThreadPoolExecutor(2) as pool:
            found = []
            for done, ranks in enumerate(
                pool.map(lambda piece: self._ranks(targets, piece, chain_only), pieces)
            ):
                found.append(ranks)
                if progress:
                    progress((done + 1) / len(pieces), "held-out users")
        names = found[0] if found else {}
        return targets.user_rows, {name: np.concatenate([one[name] for one in found]) for name in names}

    def sampled(self, targets: Targets) -> Targets:
        """Gives the targets that are ranked: of a large catalogue the same sample each time, else all."""
        count = len(targets.user_rows)
        if self.dataset.num_items < EVERY_USER_BELOW or count <= SAMPLE:
            return targets
        chosen = np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])
        return Targets(targets.user_rows[chosen], targets.history_ends[chosen], targets.item_rows[chosen])

    def _ranks(self, targets: Targets, piece: Array, chain_only: bool) -> dict[str, Array]:
        target = targets.item_rows[piece]
        answer = self.answer(targets.user_rows[piece], targets.history_ends[piece])
        ranks = {
            "chain": metrics.ranks_from_lists(answer.shown, target),
            "recall": metrics.ranks_from_lists(answer.recalled, target),
        }
        if chain_only:
            return ranks
        seen = answer.had
        scores = np.matmul(self.embeddings, answer.query.transpose(0, 2, 1)).max(axis=2)
        return ranks | {
            "user_encoder": rank_unseen(scores, seen, target),
            "popularity": rank_unseen(np.tile(self.popularity, (len(piece), 1)), seen, target),
            "transition_knn": rank_unseen(knn_scores(self.recall, answer.tensors["seen_rows"]), seen, target),
        }

    def answer(self, user_rows: Array, history_ends: Array) -> Answer:
        """Asks the chain about users [B] as they were at history_ends [B]."""
        one = self.scored(user_rows, history_ends)
        had = self.had(user_rows, history_ends)
        return Answer(one.tensors, had, one.query, one.found["candidate_rows"], one.shown)

    def scored(self, user_rows: Array, history_ends: Array) -> Scored:
        """Scores the candidates of users [B] as they were at history_ends [B]."""
        options = default_options(len(user_rows))
        tensors = self.user_tensors(user_rows, history_ends)
        query = self._encode(tensors)
        queries = self.offline.queries(user_rows, {**tensors, "user_embeddings": query})
        seen = {name: tensors[name] for name in contract.SEEN_TENSORS}
        older = older_pasts(self.dataset, user_rows, history_ends)
        found = self.recall.run(options, **seen, older=older, **queries)
        ranked = self.ranker.run({name: {**tensors, **found}[name] for name in contract.RANKER_INPUTS})
        blended = self.reranking.blend(options, ranked["candidate_probabilities"], found["candidate_scores"])
        is_there = found["candidate_rows"] > 0
        return Scored(tensors, query, found, np.where(is_there, blended, -np.inf))

    def repeats(self, targets: Targets) -> float:
        """Gives the share of (a sample of) the targets that no way may show: the user has had them before."""
        of = self.sampled(targets)
        if not len(of.user_rows):
            return 0.0
        pieces = [slice(start, start + _AT_ONCE) for start in range(0, len(of.user_rows), _AT_ONCE)]
        had = [had_before(self.had(of.user_rows[p], of.history_ends[p]), of.item_rows[p]) for p in pieces]
        return float(np.concatenate(had).mean())

    def had(self, user_rows: Array, history_ends: Array) -> Array:
        """Gives all that users [B] had at `history_ends` [B]: [B, longest past] int64, padded with -1; of
        very long pasts the newest, as recall does."""
        return all_had(self.dataset.histories, user_rows, history_ends, self.sizes.seen)

    def task_metrics(
        self, impressions: Impressions, values: Array | None = None
    ) -> dict[str, dict[str, float]]:
        """Measures the ranker on held-out impressions, each task where defined: {task: {figure: value}}.
        Figures are of what is served, which knows no places; where the shop logs them, of those too."""
        values = self.impression_probabilities(impressions) if values is None else values
        report: dict[str, dict[str, float]] = {}
        placed = self.in_place(impressions, values)
        for t, task in enumerate(self.dataset.schema.tasks):
            labels, given = impressions.labels[:, t], ~np.isnan(impressions.labels[:, t])
            report[task.name] = {"rows": int(given.sum())}
            if task.kind == "binary":
                report[task.name] |= {
                    "auc": metrics.auc(labels, values[:, t]),
                    "ece": metrics.ece(labels, values[:, t]),
                    "ece_by_chance": metrics.ece_by_chance(labels, values[:, t]),
                    "rate": float(labels[given].mean()),
                }
                if placed is not None:
                    report[task.name]["auc_with_position"] = metrics.auc(labels, placed[:, t])
                    report[task.name]["ece_with_position"] = metrics.ece(labels, placed[:, t])
                if impressions.truth is not None:
                    report[task.name]["oracle_auc"] = metrics.auc(labels, impressions.truth[:, t])
                    popularity = self.popularity[impressions.item_rows]
                    report[task.name]["popularity_auc"] = metrics.auc(labels, popularity)
            else:
                report[task.name] |= {
                    "rmse": metrics.rmse(labels, values[:, t]),
                    "std": float(labels[given].std()),
                }
                if placed is not None:
                    report[task.name]["rmse_with_position"] = metrics.rmse(labels, placed[:, t])
                if impressions.truth is not None:
                    report[task.name]["oracle_rmse"] = metrics.rmse(labels, impressions.truth[:, t])
        return report

    def in_place(self, impressions: Impressions, values: Array) -> Array | None:
        """Gives the served values [E, T] as they are at the places where the impressions were shown; None
        where the shop logs none."""
        if self.positions is None or not impressions.positions.any():
            return None
        schema = self.dataset.schema
        states = states_of(self.dataset, impressions, self.features.users["rates"][impressions.user_rows])
        facts = place_facts(schema, states.users, states.candidates)
        return self.positions.apply(schema.tasks, values, impressions.positions, facts)

    def impression_lists(self, impressions: Impressions) -> tuple[Lists, Array]:
        """Groups impressions [E] by user and moment; gives also the place of each in the flattened lists."""
        rates = self.features.users["rates"][impressions.user_rows]
        states = states_of(self.dataset, impressions, rates)
        return lists_from_impressions(impressions, self.offline.scores, states, by_moment=True)

    def impression_probabilities(self, impressions: Impressions) -> Array:
        """Gives the engine's candidate_probabilities [E, T] of each impression's item, at its time."""
        lists, places = self.impression_lists(impressions)
        parts = [np.zeros((0, len(self.dataset.schema.tasks)), np.float32)]
        for start in range(0, len(lists), BATCH):
            piece = lists.take(np.arange(start, min(start + BATCH, len(lists))))
            items = {
                "candidate_features": gather(piece.item_rows, self.features.item_reader.table, "features"),
                "candidate_scores": piece.scores,
                "candidate_state": piece.candidate_state.astype(np.float32),
                "user_state": piece.user_state[:, 0].astype(np.float32),
            }
            feeds = {**self.user_tensors(piece.user_rows, piece.history_ends), **items}
            out = self.ranker.run({name: feeds[name] for name in contract.RANKER_INPUTS})[
                "candidate_probabilities"
            ]
            parts.append(out.reshape(-1, out.shape[2]))
        return np.concatenate(parts)[places]


def all_had(histories: Histories, user_rows: Array, history_ends: Array, seen: int) -> Array:
    """Gives what Verifier.had does, `seen` being the events that a request tells recall."""
    lengths = history_ends - histories.offsets[user_rows]
    longest = int(np.clip(lengths.max(initial=0), seen, seen + MOST))
    return history_windows(histories, user_rows, history_ends, longest)


def rank_unseen(scores: Array, had: Array, target: Array) -> Array:
    """Ranks the targets [Q] in scores [Q, I + 1] without what was had [Q, *] and row 0; ties count half.

    A target that the user has had before is missed, as it is by the chain, which shows nothing twice.
    """
    scores = scores.astype(np.float32, copy=True)
    lines, columns = np.nonzero(had > 0)
    scores[lines, had[lines, columns]] = -np.inf
    scores[:, 0] = -np.inf
    return metrics.ranks_from_scores(scores, np.where(had_before(had, target), -1, target))


def knn_scores(recall: Recall, seen_rows: Array) -> Array:
    """Gives the transition score of every item [Q, I + 1] for pasts seen_rows [Q, W]; 0 where it has none."""
    rows, scores = recall.source(Transitions).followers(seen_rows)
    dense = np.zeros((len(rows), len(recall.source(Popular).popularity)), np.float32)
    lines, columns = np.nonzero(rows > 0)
    dense[lines, rows[lines, columns]] = scores[lines, columns]
    return dense


def had_before(seen_rows: Array, target: Array) -> Array:
    """Says whose target [Q] is among the items that the user has had, seen_rows [Q, W]: [Q] bool."""
    return (seen_rows == target[:, None]).any(axis=1)

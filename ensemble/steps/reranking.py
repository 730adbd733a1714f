"""Step 5, reranking: makes one score of the probabilities and picks the K items to show, under the request's
rules."""

from __future__ import annotations

import json

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.contract import Degraded
from ensemble.live.state import LiveView
from ensemble.options import NO_CAP, Options
from ensemble.spec import ModelSpec
from ensemble.steps.blend import BLEND, read_blend
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import AnswerCounts, Metric


class Reranking:
    """Blends task values by weights, caps categories and diversifies; reads item rows only when a rule needs
    them."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("item_ids.npy", "items.npy")
        if (release.path / BLEND).exists():
            release.verify_data(BLEND)
        self.blended = read_blend(release.path)
        self.live = release.live
        self.tasks = release.schema.tasks
        self.columns = {task.name: t for t, task in enumerate(self.tasks)}
        self.given = [self.columns[task.given] if task.given else -1 for task in self.tasks]
        self.category = {f.name: f for f in release.schema.items.features if f.kind == "category"}
        self.release = release.name.encode()
        self.task_names = json.dumps([task.name for task in self.tasks]).encode()
        self.counts = AnswerCounts()

    def run(
        self,
        options: Options,
        *,
        candidate_rows: Array,
        candidate_probabilities: Array,
        candidate_scores: Array,
        user_status: Array,
        candidate_status: Array,
    ) -> Tensors:
        """Makes of candidate_* [B, N…] the answer [B, K…], K the largest top_k of the batch (contract.py)."""
        view = self.live.refresh()
        probabilities = np.nan_to_num(candidate_probabilities, nan=0.0, posinf=0.0, neginf=0.0)
        scores = np.where(
            (candidate_rows > 0) & (candidate_rows < view.num_rows),
            self.blend(options, probabilities, candidate_scores),
            -np.inf,
        )
        skipped = (candidate_status[:, 0] & Degraded.RANK_SKIPPED) > 0
        if skipped.any():  # recall's order stands, as numbers that fall with it
            fall = 1 - np.arange(scores.shape[1], dtype=np.float32) / scores.shape[1]
            scores[skipped] = np.where(np.isfinite(scores[skipped]), fall, -np.inf)
            probabilities[skipped] = 0
        order = self.order(options, candidate_rows, scores, view)
        answer = self.answer(options, order, candidate_rows, scores, probabilities, view)
        return self.counted(answer, user_status | candidate_status)

    def counted(self, answer: Tensors, degraded: Array) -> Tensors:
        """Puts `degraded` [B, 1] into an answer, and counts its bits where it has a list: the others are
        nobody's, as in warming up."""
        self.counts.count(degraded[(answer["item_ids"] != b"").any(axis=1)])
        return {**answer, "degraded": degraded}

    def order(self, options: Options, candidate_rows: Array, scores: Array, view: LiveView) -> Array:
        """Gives the places [B, K] of the candidates [B, N] to show, best first, ties by row."""
        order = np.lexsort((candidate_rows, -scores), axis=-1)
        width = min(int(options.top_k.max(initial=1)), order.shape[1])
        ruled = np.array([i for i, u in enumerate(options.users) if u.caps or u.diversity > 0], np.int64)
        if len(ruled):
            order[ruled] = self._under_rules(
                options, ruled, candidate_rows[ruled], scores[ruled], order[ruled], width, view
            )
        return order[:, :width]

    def answer(
        self,
        options: Options,
        order: Array,
        candidate_rows: Array,
        scores: Array,
        probabilities: Array,
        view: LiveView,
    ) -> Tensors:
        """Gives the answer's tensors but `degraded` of the candidates at places `order` [B, K]."""
        rows = np.take_along_axis(candidate_rows, order, axis=1)
        shown = (rows > 0) & (np.arange(order.shape[1]) < options.top_k[:, None])
        return {
            "item_ids": view.ids_from_rows(np.where(shown & (rows < view.num_rows), rows, 0)).astype(object),
            "scores": np.where(shown, np.take_along_axis(scores, order, axis=1), 0).astype(np.float32),
            "probabilities": np.where(
                shown[..., None], np.take_along_axis(probabilities, order[..., None], axis=1), 0
            ).astype(np.float32),
            "tasks": np.full((len(rows), 1), self.task_names, object),
            "release": np.full((len(rows), 1), self.release, object),
            "sequence": np.full((len(rows), 1), view.sequence, np.int64),
        }

    def metrics(self) -> list[Metric]:
        """Lists how many lists were given, and how many with which flag."""
        return self.counts.metrics()

    def blend(self, options: Options, probabilities: Array, candidate_scores: Array) -> Array:
        """Blends probabilities [B, N, T] and candidate_scores [B, N, S] into scores [B, N]: the sum of
        weight x value, where a conditional task's value is its probability times the value that it is
        conditional on, joined with recall's relevance (ensemble/steps/blend.py).

        So the buy term is P(click) P(buy | click), the probability over the entire space (ESMM, Ma et al.
        2018, eq. 1). A request that weighs a task wants the tasks, whatever the build found best.
        """
        weights = np.tile(np.array([task.weight for task in self.tasks], np.float32), (len(options), 1))
        powers = np.full(len(options), self.blended.power, np.float32)
        uses_tasks = np.full(len(options), self.blended.uses_tasks)
        for user, one in enumerate(options.users):
            for name, weight in one.weights:
                if name in self.columns:
                    weights[user, self.columns[name]] = weight
                    uses_tasks[user] = True
                else:
                    powers[user] = weight
        values = probabilities.copy()
        for t, given in enumerate(self.given):  # tasks are ordered: what is given comes before
            if given >= 0:
                values[..., t] *= values[..., given]
        summed = np.einsum("bnt,bt->bn", values, weights)
        return self.blended.score(summed, candidate_scores, powers, uses_tasks)

    def _under_rules(
        self,
        options: Options,
        users: Array,
        rows: Array,
        scores: Array,
        order: Array,
        width: int,
        view: LiveView,
    ) -> Array:
        """Chooses `width` candidates greedily for the b users that ask for caps or diversity -> order [b, N].

        MMR (Carbonell & Goldstein 1998): (1 - diversity) x relevance - diversity x greatest cosine to what is
        chosen, relevance scaled to 0..1 a user. A capped candidate is put behind all others, never dropped: a
        short list is worse.
        """
        # Best first.
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        diversity = np.array([options.users[u].diversity for u in users], np.float32)[:, None]
        value = (1 - diversity) * _scaled(scores)
        vectors = view.gather(rows, "embedding")
        vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-12)
        caps = [
            self._cap(options, users, name, rows, view)
            for name in {name for u in users for name, _ in options.users[u].caps}
        ]
        nearest = np.zeros(rows.shape, np.float32)
        taken = np.zeros(rows.shape, bool)
        chosen = []
        lines = np.arange(len(rows))
        for _ in range(width):  # K turns, each over all users at once
            utility = value - diversity * nearest - 1e6 * (rows <= 0)
            for counts, limit, _codes in caps:
                utility = utility - 1e3 * (counts >= limit)
            pick = np.argmax(np.where(taken, -np.inf, utility), axis=1)
            chosen.append(pick)
            taken[lines, pick] = True
            nearest = np.maximum(nearest, np.einsum("bnd,bd->bn", vectors, vectors[lines, pick]))
            for counts, _limit, codes in caps:
                counts += (
                    (codes[:, :, :, None] == codes[lines, pick][:, None, None, :]) & (codes > 0)[..., None]
                ).any(axis=(2, 3))
        rest = np.argsort(taken, axis=1, kind="stable")[:, : rows.shape[1] - width]
        return np.take_along_axis(order, np.concatenate([np.stack(chosen, axis=1), rest], axis=1), axis=1)

    def _cap(
        self, options: Options, users: Array, name: str, rows: Array, view: LiveView
    ) -> tuple[Array, Array, Array]:
        """Gives for one capped feature the number of chosen items that share a value [b, N], the limit [b, 1]
        and the values' codes [b, N, C]."""
        limits = np.array([dict(options.users[u].caps).get(name, NO_CAP) for u in users])[:, None]
        codes = view.gather(np.maximum(rows, 0), "codes")[..., self.category[name].columns]
        return np.zeros(rows.shape, np.int64), limits, codes


def _scaled(scores: Array) -> Array:
    """Scales scores [b, N] to 0..1 a user; -inf becomes 0."""
    finite = np.isfinite(scores)
    low = np.where(finite, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(finite, scores, -np.inf).max(axis=1, keepdims=True)
    span = np.where(np.isfinite(high - low) & (high > low), high - low, 1)
    return np.where(finite, (scores - np.where(np.isfinite(low), low, 0)) / span, 0).astype(np.float32)

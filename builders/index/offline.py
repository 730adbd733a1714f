"""Asks the recall that will be served about any user at any point of the history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from builders.data.dataset import Dataset, history_windows
from builders.index.snapshot import older_pasts
from builders.index.staged import StagedRelease
from ensemble.arrays import Array
from ensemble.contract import QUERY_TENSORS, SEEN_TENSORS
from ensemble.index.probe import ProbeSettings
from ensemble.local import open_step
from ensemble.options import Options, default_options
from ensemble.release.release import Release
from ensemble.release.snapshot import gather
from ensemble.spec import ModelSpec
from ensemble.steps.recall import Recall
from ensemble.steps.sources import Nearest


class OfflineRecall:
    """Asks the Recall that will be served about any user at any time; gives scores and candidates."""

    def __init__(self, dataset: Dataset, folder: Path, encode_users: EncodeUsers) -> None:
        staged = StagedRelease(folder)
        self.recall = Recall(staged.model("recall"), staged)
        for source in self.recall.sources:
            if isinstance(source, Nearest):
                source.probe.settings = ProbeSettings(share=0)  # for live queries only
        self.dataset, self.encode_users = dataset, encode_users
        self.between = [
            (model, open_step(model, staged))
            for model in _before_recall(staged)
            if model.name not in ("features", "user_encoder")
        ]
        self.query_names = [
            spec.name for spec in staged.model("recall").inputs if spec.name not in (*SEEN_TENSORS, "user_id")
        ]

    def candidates(self, user_rows: Array, history_ends: Array) -> tuple[Array, Array]:
        """Gives what recall would have offered: rows [L, N] (-1 padded, best first), scores [L, N, S]."""
        return self.candidates_for(self.encode_users(user_rows, history_ends), user_rows, history_ends)

    def candidates_for(
        self,
        user_embeddings: Array,
        user_rows: Array,
        history_ends: Array,
        options: Callable[[int], Options] = default_options,
    ) -> tuple[Array, Array]:
        """Does candidates() with the users' embeddings [L, M, D] already there, and what a number of users
        ask for."""
        sizes = self.recall.sizes
        rows, scores = (
            np.full((len(user_rows), sizes.candidates), -1, np.int64),
            np.zeros((len(user_rows), sizes.candidates, len(self.recall.sources)), np.float32),
        )
        for piece in _pieces(len(user_rows)):
            asked = self._asked(user_embeddings[piece], user_rows[piece], history_ends[piece])
            found = self.recall.run(options(len(user_rows[piece])), **asked)
            rows[piece], scores[piece] = found["candidate_rows"], found["candidate_scores"]
        return rows, scores

    def offers_for(self, user_embeddings: Array, user_rows: Array, history_ends: Array) -> list[Array]:
        """Gives each source's first N items that users [L] could be shown: rows [L, N], best first, padded
        with -1; Recall.merged makes candidates of them, under any quotas."""
        shape = len(user_rows), self.recall.sizes.candidates
        offers = [np.full(shape, -1, np.int64) for _ in self.recall.sources]
        for piece in _pieces(len(user_rows)):
            asked = self._asked(user_embeddings[piece], user_rows[piece], history_ends[piece])
            found = self.recall.offers(default_options(len(user_rows[piece])), **asked)
            for all_rows, rows in zip(offers, found, strict=True):
                all_rows[piece, : rows.shape[1]] = rows
        return offers

    def _asked(self, user_embeddings: Array, user_rows: Array, history_ends: Array) -> dict[str, Any]:
        """Gives what recall is asked for users [L] with their embeddings [L, M, D]: its tensors, and what
        they had before."""
        seen = history_windows(self.dataset.histories, user_rows, history_ends, self.recall.sizes.seen)
        queries = self.queries(user_rows, {"seen_rows": seen, "user_embeddings": user_embeddings})
        older = older_pasts(self.dataset, user_rows, history_ends)
        return {"seen_rows": seen, "older": older, **queries}

    def scores(self, user_rows: Array, history_ends: Array, item_rows: Array) -> Array:
        """Gives every source's score [L, N, S] float32 of item_rows [L, N] (-1 padded) at [L], [L]."""
        out = np.zeros((*item_rows.shape, len(self.recall.sources)), np.float32)
        user_embeddings = self.encode_users(user_rows, history_ends)
        for piece in _pieces(len(user_rows)):
            seen = history_windows(
                self.dataset.histories, user_rows[piece], history_ends[piece], self.recall.sizes.seen
            )
            embeddings = gather(item_rows[piece], self.recall.items, "embedding")
            queries = self.queries(
                user_rows[piece], {"seen_rows": seen, "user_embeddings": user_embeddings[piece]}
            )
            query = np.concatenate([queries[name] for name in QUERY_TENSORS], axis=1)
            out[piece] = self.recall.source_scores(query, seen, item_rows[piece], embeddings)
        return out

    def queries(self, user_rows: Array, tensors: dict[str, Array]) -> dict[str, Array]:
        """Gives what recall takes beside seen_rows [L, W]; runs models before it but the user encoder."""
        known = {"user_id": self.dataset.user_ids[user_rows - 1][:, None], **tensors}
        for model, step in self.between:
            known |= step.run(
                default_options(len(user_rows)), **{spec.name: known[spec.name] for spec in model.inputs}
            )
        return {name: known[name] for name in self.query_names}


def _before_recall(release: Release) -> list[ModelSpec]:
    models = release.pipeline.models
    return list(models[: [model.name for model in models].index("recall")])


def _pieces(count: int, size: int = 256) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


EncodeUsers = Callable[[Array, Array], Array]  # user_rows [L], history_ends [L] -> user_embeddings [L, M, D]


class ScoreFunction(Protocol):
    """Scores any item at any point of a history; must know nothing that happened after training ended."""

    def __call__(self, user_rows: Array, history_ends: Array, item_rows: Array) -> Array:
        """Scores item_rows [L, N] (-1 padded) for users [L] at absolute history_ends [L]: [L, N, S]."""


class CandidateFunction(Protocol):
    """Offers what recall would at any point of a history."""

    def __call__(self, user_rows: Array, history_ends: Array) -> tuple[Array, Array]:
        """Offers rows [L, N] (-1 padded, best first) and scores [L, N, S] to users [L] at their ends [L]."""

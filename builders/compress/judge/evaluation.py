"""Judges of a staged release: real users' feeds to calibrate on, and what held-out users get when one model
is replaced.

Three sets of users, so that nothing is judged by what chose it: a quarter of the shop's users calibrates
(their training histories only); of the others, the validation targets judge each variant of a model; the test
targets are left to the gate.

Axes: Q held-out users, I items, D embedding, M interests, N candidates, K shown items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.compress.judge.judge import Judge, Judged
from builders.compress.judge.measure import (
    TOP_K,
    Measured,
    Timing,
    at_once,
    in_chunks,
    in_order,
    measure_ranking,
    measure_tasks,
    recalled_tensors,
)
from builders.compress.judge.timing import time_pair
from builders.compress.session import open_onnx
from builders.data.dataset import Dataset, Targets
from builders.data.splits import first_of_users
from builders.export.verifier import BATCH, EVERY_USER_BELOW, Verifier, had_before
from builders.index.staged import StagedRelease
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.engines import CHUNK, EngineStep
from ensemble.engines.onnx import OnnxEngine
from ensemble.errors import InvalidInput
from ensemble.options import default_options
from ensemble.release.events import HistoryEvents
from ensemble.release.snapshot import gather

JUDGED = 4000  # users that judge a variant: seconds for a ranker; the gate asks all
CALIBRATION_SHARE = 4  # one user of so many calibrates and never judges
# Tensors gathered out of the item rows: where, and what. They are 95% of the bytes, so they are not kept.
# What the events add to those of the history comes back by their cells.
_FROM_ITEMS = {
    "history_embeddings": ("history_rows", "embedding"),
    "history_features": ("history_rows", "features"),
    "candidate_features": ("candidate_rows", "features"),
}
_ENCODED = 1024  # items at once
_ENGINES = ("user_encoder", "item_encoder", "ranker")


@dataclass(frozen=True)
class _Held:
    """Holds users, and the chain up to the ranker, asked once.

    `items` are the rows they meet, and all row numbers count in it.
    """

    true: Array  # [Q] int64: the true next item
    tensors: Tensors  # [Q, …] by name, without those that are gathered out of `items`
    items: Array  # [R] packed rows (snapshot.item_dtype); row 0 is the unknown item
    rows: Array  # [R] int64: their rows in the catalogue, ascending
    events: HistoryEvents

    def pieces(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, len(self.true), size)]

    def feeds(self, names: Iterable[str], piece: slice) -> Tensors:
        """Gives the named tensors of some of the users."""
        gathered = {name: _FROM_ITEMS[name] for name in names if name in _FROM_ITEMS}
        found = {
            name: gather(self.tensors[rows][piece], self.items, field)
            for name, (rows, field) in gathered.items()
        }
        cells = self.tensors["history_cells"][piece]
        for name in found:
            rows, field = gathered[name]
            if rows == "history_rows":
                found[name] = self.events.added(field, found[name], cells)
        return found | {name: self.tensors[name][piece] for name in names if name not in gathered}


class Evaluation:
    """Judges the models of one staged release by held-out users.

    item_id_embeddings [I + 1, E] are what item_encoder reads.
    """

    def __init__(
        self, dataset: Dataset, folder: Path, *, item_id_embeddings: Array | None = None, seed: int = 0
    ) -> None:
        self.dataset, self.folder, self.seed = dataset, folder, seed
        self.verifier = Verifier(dataset, folder)
        self.item_id_embeddings = item_id_embeddings
        self._own_users = (
            np.random.default_rng(seed).permutation(dataset.num_users)[
                : dataset.num_users // CALIBRATION_SHARE
            ]
            + 1
        )
        self._held: dict[int, _Held] = {}

    # --- feeds

    def feeds(self, model: str, num_users: int) -> Tensors:
        """Gives the model's inputs for `num_users` users that never judge, as training knew them.

        For item_encoder: for so many items.
        """
        names = [spec.name for spec in StagedRelease(self.folder).model(model).inputs]
        if model == "item_encoder":
            rows = np.random.default_rng(self.seed).permutation(self.dataset.num_items)[:num_users] + 1
            return self._item_feeds(rows)
        self.check_users(num_users)
        pieces = [
            self._own_users[start : min(start + BATCH, num_users)] for start in range(0, num_users, BATCH)
        ]

        def ask(users: Array) -> Tensors:
            known = recalled_tensors(self.verifier, users, np.asarray(self.dataset.train_ends[users]))
            return {name: known[name] for name in names}

        parts = at_once(ask, pieces)
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def check_users(self, num_users: int) -> None:
        """InvalidInput when feeds() cannot give so many users."""
        most = len(self._own_users)
        if not most:
            raise InvalidInput(
                f"no users to calibrate on: this shop has {self.dataset.num_users}, a quarter of which "
                "would; use --compress none"
            )
        if num_users > most:
            raise InvalidInput(
                f"calibration_users = {num_users}: this shop has {most} for it, a quarter of its "
                f"{self.dataset.num_users} users; "
                f"set calibration_users = {most} or fewer in the recipe"
            )

    def most(self, model: str) -> int:
        """Says how many users (for item_encoder: items) feeds() can give at most."""
        return self.dataset.num_items if model == "item_encoder" else len(self._own_users)

    def _item_feeds(self, rows: Array) -> Tensors:
        if self.item_id_embeddings is None:
            raise InvalidInput(
                "item_encoder: its feeds need item_id_embeddings, the id rows of training; give them to "
                "Evaluation"
            )
        codes, values = np.asarray(self.dataset.item_codes[rows]), np.asarray(self.dataset.item_values[rows])
        return {
            "item_id_embedding": np.ascontiguousarray(self.item_id_embeddings[rows]),
            "item_codes": codes,
            "item_values": values,
        }

    # --- judges

    def judge(self, model: str, users: int = JUDGED) -> Judge:
        """Gives a judge: what (at most `users`) held-out users get with a variant in place of `model`.

        All else is as in the staged release.

        ranker: the chain's list over recall's candidates. user_encoder: exact inner products with the
        catalogue (a sample of 100,000 of a larger one). item_encoder: both, after encoding the items again;
        the gain is the mean of the two, and the second list's rows are shifted by the number of items, so
        that each list is compared with its own.
        """
        if model not in _ENGINES:
            raise InvalidInput(f"no engine {model!r} to judge; engines: {', '.join(_ENGINES)}")
        held = self._users(users)
        if model == "ranker":
            return lambda variant: self._ranked(open_onnx(variant, model).run, held)
        if model == "user_encoder":
            return lambda variant: self._searched(_encoded(open_onnx(variant, model), held), held)
        embeddings = _encoded(self.verifier.user_encoder, held)
        return lambda variant: self._with_items(open_onnx(variant, model), embeddings, held)

    def _users(self, count: int) -> _Held:
        if count not in self._held:
            self._held[count] = self._ask(self._sample(count))
        return self._held[count]

    def _sample(self, count: int) -> Targets:
        targets = self.dataset.validation
        firsts = first_of_users(targets.user_rows, 1)  # a user judges once
        judging = firsts[~np.isin(targets.user_rows[firsts], self._own_users)]
        if not len(judging):
            raise InvalidInput("no held-out users to judge by: the shop's split leaves no validation targets")
        chosen = judging[np.sort(np.random.default_rng(self.seed).permutation(len(judging))[:count])]
        return Targets(targets.user_rows[chosen], targets.history_ends[chosen], targets.item_rows[chosen])

    def _ask(self, targets: Targets) -> _Held:
        def ask(start: int) -> Tensors:
            known = recalled_tensors(
                self.verifier,
                targets.user_rows[start : start + BATCH],
                targets.history_ends[start : start + BATCH],
            )
            return {name: array for name, array in known.items() if name not in _FROM_ITEMS}

        parts = at_once(ask, range(0, len(targets.user_rows), BATCH))
        tensors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        kept = np.concatenate(
            [
                [0],
                targets.item_rows,
                *(tensors[name].ravel() for name in ("seen_rows", "candidate_rows")),
                self._catalogue(),
            ]
        )
        rows = np.unique(np.maximum(kept, 0))
        for name in ("seen_rows", "candidate_rows"):
            tensors[name] = np.where(tensors[name] < 0, -1, np.searchsorted(rows, tensors[name]))
        tensors["history_rows"] = tensors["seen_rows"][:, -self.dataset.schema.sizes.history :]
        return _Held(
            np.searchsorted(rows, targets.item_rows),
            tensors,
            self.verifier.features.item_reader.table[rows],
            rows,
            self.verifier.features.events,
        )

    def _catalogue(self) -> Array:
        """Rows [I] that are searched: all, or a sample of a large catalogue."""
        order = np.random.default_rng(self.seed).permutation(self.dataset.num_items)
        return order[:EVERY_USER_BELOW] + 1

    def _ranked(self, ranker: Callable[[Tensors], Tensors], held: _Held) -> Judged:
        def rank(piece: slice) -> tuple[Array, Array]:
            rows = held.tensors["candidate_rows"][piece]
            ordered = in_order(
                self.verifier.reranking,
                rows,
                in_chunks(ranker, held.feeds(contract.RANKER_INPUTS, piece)),
                held.tensors["candidate_scores"][piece],
            )
            return metrics.gains(metrics.ranks_from_lists(ordered, held.true[piece]), TOP_K), ordered[
                :, :TOP_K
            ]

        return _judged(at_once(rank, held.pieces(CHUNK)), held)

    def _searched(self, user_embeddings: Array, held: _Held) -> Judged:
        """Ranks held.items exactly by inner product, what was seen left out; user_embeddings [Q, M, D]."""
        items = np.ascontiguousarray(held.items["embedding"].T)
        return _judged(at_once(partial(_search, items, user_embeddings, held), held.pieces(BATCH)), held)

    def _with_items(self, encoder: OnnxEngine, user_embeddings: Array, held: _Held) -> Judged:
        items = held.items.copy()
        items["embedding"], items["features"] = self.encoded_items(encoder, held.rows)
        variant = replace(held, items=items)
        searched, ranked = (
            self._searched(user_embeddings, variant),
            self._ranked(self.verifier.ranker.run, variant),
        )
        shifted = np.where(ranked.lists > 0, ranked.lists + self.dataset.num_items, -1)
        return Judged((searched.gains + ranked.gains) / 2, np.concatenate([searched.lists, shifted], axis=1))

    def encoded_items(self, encoder: OnnxEngine, rows: Array) -> tuple[Array, Array]:
        """Encodes the items of rows [R]: embeddings [R, D] and features [R, F] float32."""
        sizes = self.dataset.schema.sizes
        embeddings, features = (
            np.empty((len(rows), sizes.embedding), np.float32),
            np.empty((len(rows), sizes.item_features), np.float32),
        )
        for start in range(0, len(rows), _ENCODED):
            piece = slice(start, start + _ENCODED)
            found = encoder.run(self._item_feeds(rows[piece]))
            embeddings[piece], features[piece] = found["item_embedding"], found["item_features"]
        return embeddings, features

    # --- the whole release

    def measure(self, folder: Path, *, file: str = "model.onnx") -> Measured:
        """Measures a whole staged release on the test users and impressions.

        Its engines are timed in turns with this Evaluation's release.

        `file`: the engine of each model ("model.tensorrt.onnx": accuracy only, on the CPU; times would say
        nothing there).
        """
        verifier = Verifier(self.dataset, folder)
        for model in ("user_encoder", "ranker"):
            path = folder / "engines" / model / file
            if file != "model.onnx" and path.is_file():
                setattr(verifier, model, open_onnx(path.read_bytes(), str(path)))
        if not len(self.dataset.test.user_rows):
            raise InvalidInput("no held-out users for the gate: the shop's split leaves no test targets")
        ranking = measure_ranking(verifier, self.dataset.test)
        impressions = self.dataset.test_impressions
        tasks = () if impressions is None else measure_tasks(verifier, impressions)
        return replace(ranking, tasks=tasks, timings=self.timings(folder) if file == "model.onnx" else ())

    def timings(self, folder: Path) -> tuple[Timing, ...]:
        """Times each engine at batch 1, 8 and max beside this Evaluation's, as they are served.

        That is in chunks, on one thread.
        """
        found = []
        most = self.dataset.schema.sizes.max_batch
        for model in _ENGINES if self.item_id_embeddings is not None else ("user_encoder", "ranker"):
            steps = [
                EngineStep(staged.model(model), staged)
                for staged in (StagedRelease(folder), StagedRelease(self.folder))
            ]
            real = self.feeds(model, min(most, len(self._own_users)))
            for batch in sorted({1, 8, most}):
                feeds = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in real.items()}
                calls = [partial(step.run, default_options(batch), **feeds) for step in steps]
                found.append(Timing(model, batch, *time_pair(*calls)))
        return tuple(found)


def _encoded(encoder: Any, held: _Held) -> Array:
    """Encodes users by an engine or a session: user_embeddings [Q, M, D]."""

    def encode(piece: slice) -> Array:
        return encoder.run(held.feeds(contract.USER_ENCODER_INPUTS, piece))["user_embeddings"]

    return np.concatenate(at_once(encode, held.pieces(BATCH)))


def _search(items: Array, user_embeddings: Array, held: _Held, piece: slice) -> tuple[Array, Array]:
    """Searches items [D, R]: gives gains [B] of the true next items, and the best K rows [B, K] of `held`."""
    seen, true = held.tensors["seen_rows"][piece], held.true[piece]
    scores = np.nan_to_num((user_embeddings[piece] @ items).max(axis=1), nan=-np.inf)
    lines, columns = np.nonzero(seen > 0)
    scores[lines, seen[lines, columns]] = -np.inf
    scores[:, 0] = -np.inf
    best = np.argpartition(-scores, min(TOP_K, scores.shape[1] - 1), axis=1)[:, :TOP_K]
    order = np.lexsort((best, -np.take_along_axis(scores, best, axis=1)), axis=-1)
    ranks = metrics.ranks_from_scores(scores, np.where(had_before(seen, true), -1, true))
    return metrics.gains(ranks, TOP_K), np.take_along_axis(best, order, axis=1)


def _judged(parts: list[tuple[Array, Array]], held: _Held) -> Judged:
    gains, lists = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Judged(gains, np.where(lists > 0, held.rows[lists], -1))

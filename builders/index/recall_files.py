"""Writes the files that recall opens: the index, transitions, popularity, the weights of its sources."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, training_histories
from builders.index.choice import (
    FLAT_BELOW,
    IndexKind,
    IndexTarget,
    TunedIndex,
    choose_kind,
    exact_positions,
    index_of_kind,
    pack_vectors,
    tune,
)
from builders.index.offline import OfflineRecall
from builders.index.snapshot import write_items
from builders.index.transitions import item_transitions
from ensemble.arrays import Array
from ensemble.index.item_index import VECTORS
from ensemble.index.main_index import MainIndex, QuerySettings
from ensemble.index.probe import BASELINE, baseline
from ensemble.steps.recall import fused
from ensemble.steps.recall_settings import RecallSettings

# transitions kept an item; a quarter of it on large catalogues, whose lists would outgrow the embeddings
NEIGHBOURS = 100
_TRANSITION_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_POPULAR_WEIGHTS = (0.0, 0.1, 0.2, 0.4)


def build_index(
    embeddings: Array,
    queries: Array,
    seed: int = 0,
    *,
    budget_bytes: int | None = None,
    target: IndexTarget | None = None,
) -> tuple[TunedIndex, IndexKind]:
    """Builds the index over embeddings [I, D] and tunes it on `queries` [Q, D]; returns it with its kind."""
    num_items, dim = embeddings.shape
    target, kind = target or IndexTarget(), choose_kind(num_items, dim, budget_bytes, seed=seed)

    def chunks(start: int, stop: int) -> Array:
        return np.ascontiguousarray(embeddings[start:stop], np.float32)

    index = index_of_kind(kind, num_items, dim, chunks)
    truth = exact_positions(queries, min(target.k, num_items), num_items, chunks)
    return tune(
        index,
        kind,
        lambda rows: embeddings[rows - 1],
        queries,
        truth,
        dataclasses.replace(target, k=truth.shape[1]),
    ), kind


def write_vectors(embeddings: Array, kind: IndexKind, folder: Path) -> None:
    """Writes vectors.npy, embeddings [I + 1, D] as the kind is refined with; nothing where it needs none."""
    if kind.refined:
        num_items, dim = len(embeddings) - 1, embeddings.shape[1]
        pack_vectors(
            folder / VECTORS,
            kind,
            num_items,
            dim,
            lambda start, stop: np.asarray(embeddings[start + 1 : stop + 1]),
        )


def write_recall(
    dataset: Dataset,
    item_embeddings: Array,
    user_embeddings: Array,
    folder: Path,
    seed: int = 0,
    budget_bytes: int | None = None,
    source_weights: tuple[float, ...] | None = None,
) -> list[dict[str, Any]]:
    """Writes into `folder` all that Recall opens beside the data stage's files, which are linked there
    before.

    user_embeddings [Q, M, D] are those of dataset.validation, in its order. Only the training part of the
    histories is learned from. `source_weights` are those of a verified model; None: they are fitted. Returns
    the index's table of tried settings.
    """
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))  # an index that was searched before sets one
    tuned = _write_index(item_embeddings, user_embeddings, folder, seed, budget_bytes)
    offsets, item_rows = training_histories(dataset)
    _write_transitions(offsets, item_rows, dataset.num_items, folder)
    counts = np.bincount(item_rows, minlength=dataset.num_items + 1)
    counts[0] = 0
    np.save(folder / "popular.npy", np.log1p(counts).astype(np.float32))
    write_items(dataset, item_embeddings, None, folder)
    settings = _settings(tuned.query, dataset.schema.sizes.candidates)
    if source_weights is not None:
        settings = dataclasses.replace(settings, source_weights=source_weights)
    (folder / "recall.json").write_text(settings.to_json())  # Recall itself helps to fit its weights
    if source_weights is None:
        fitted = _with_fitted_weights(dataset, user_embeddings, folder, settings)
        (folder / "recall.json").write_text(fitted.to_json())
    return tuned.tried


def _write_index(
    item_embeddings: Array, user_embeddings: Array, folder: Path, seed: int, budget_bytes: int | None
) -> TunedIndex:
    """Writes the index, its vectors if it needs any, and the probe's baseline; item_embeddings [I + 1, D]."""
    queries = (
        np.ascontiguousarray(user_embeddings[:512, 0]) if len(user_embeddings) else item_embeddings[1:513]
    )
    tuned, kind = build_index(item_embeddings[1:], queries, seed, budget_bytes=budget_bytes)
    faiss.write_index(tuned.index, str(folder / "index.faiss"))
    write_vectors(item_embeddings, kind, folder)
    index = MainIndex(tuned.index, lambda rows: item_embeddings[rows], tuned.query)
    best_scores = index.search(queries, 1)[1][:, 0]
    (folder / BASELINE).write_text(baseline(queries, best_scores).to_json())
    return tuned


def _write_transitions(offsets: Array, item_rows: Array, num_items: int, folder: Path) -> None:
    """Writes transitions.npy: what follows each item in the histories (offsets [U + 2], item_rows [P])."""
    neighbours = NEIGHBOURS if num_items < FLAT_BELOW else NEIGHBOURS // 4
    rows, scores = item_transitions(offsets, item_rows, num_items, window=8, neighbours=neighbours)
    transitions = np.zeros(len(rows), [("rows", "<i4", rows.shape[1:]), ("scores", "<f4", scores.shape[1:])])
    transitions["rows"], transitions["scores"] = rows, scores
    np.save(folder / "transitions.npy", transitions)


def _settings(query: QuerySettings, num_candidates: int) -> RecallSettings:
    """Keeps places for the sources beside the index: 3/8 for transitions, 1/16 for popular."""
    return RecallSettings(
        **dataclasses.asdict(query),
        transition_quota=num_candidates * 3 // 8,
        popular_quota=num_candidates // 16,
    )


def _with_fitted_weights(
    dataset: Dataset, user_embeddings: Array, folder: Path, settings: RecallSettings
) -> RecallSettings:
    """Fits source weights to the best NDCG@10 on (a sample of) the validation targets; embeddings weigh 1."""
    targets = dataset.validation
    chosen = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:4000])
    if not len(chosen):
        return settings
    offline = OfflineRecall(dataset, folder, lambda user_rows, history_ends: np.zeros(0))
    rows, scores = offline.candidates_for(
        user_embeddings[chosen], targets.user_rows[chosen], targets.history_ends[chosen]
    )
    is_target = rows == targets.item_rows[chosen][:, None]
    column = np.where(is_target.any(axis=1), is_target.argmax(axis=1), -1)
    grid = [(1.0, transition, popular) for transition in _TRANSITION_WEIGHTS for popular in _POPULAR_WEIGHTS]
    values = [
        metrics.ndcg(metrics.ranks_from_scores(fused(rows, scores, weights), column), 10) for weights in grid
    ]
    return dataclasses.replace(settings, source_weights=grid[int(np.argmax(values))])

"""Writes the files that recall opens: the index, transitions, popularity, the weights of its sources."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from builders.data.dataset import Dataset, training_histories
from builders.data.splits import first_of_users
from builders.index.choice import (
    FLAT_BELOW,
    IndexKind,
    TunedIndex,
    build_index,
    pack_vectors,
)
from builders.index.fitting import Fitting
from builders.index.offline import EncodeUsers
from builders.index.snapshot import write_items
from builders.index.sources import write_sources
from builders.index.transitions import item_transitions
from ensemble.arrays import Array
from ensemble.index.item_index import VECTORS
from ensemble.index.main_index import MainIndex
from ensemble.index.probe import BASELINE, baseline
from ensemble.schema import Schema
from ensemble.steps.recall_settings import RecallSettings

# transitions kept an item; a quarter of it on large catalogues, whose lists would outgrow the embeddings
NEIGHBOURS = 100


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
    verified: RecallSettings | None = None,
    encode_users: EncodeUsers | None = None,
) -> RecallFacts:
    """Writes into `folder` all that Recall opens beside the data stage's files, which are linked there
    before.

    user_embeddings [Q, M, D] are those of dataset.validation, in its order. Only the training part of the
    histories is learned from. encode_users gives users' embeddings at any time; without it nothing is fitted
    of what is taken again. Sources are on, and weigh, as in a verified model; None: that is fitted.
    """
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))  # an index that was searched before sets one
    # a user tunes it once: queries of one user are alike
    firsts = first_of_users(dataset.validation.user_rows, 1)
    tuned = _write_index(item_embeddings, user_embeddings[firsts], folder, seed, budget_bytes)
    offsets, item_rows = training_histories(dataset)
    _write_transitions(offsets, item_rows, dataset.num_items, folder)
    np.save(folder / "popular.npy", _popularity(dataset, item_rows))
    write_items(dataset, item_embeddings, None, folder)
    more = write_sources(dataset, folder, seed)
    settings = RecallSettings(**dataclasses.asdict(tuned.query), **more, quotas=_quotas(dataset.schema))
    if verified is not None:
        same = {
            name: getattr(verified, name)
            for name in ("source_weights", "off", "content_items", "again", "quotas")
        }
        settings = dataclasses.replace(settings, **same)
        (folder / "recall.json").write_text(settings.to_json())
        return RecallFacts(tuned.tried, [], {}, [])
    fitting = Fitting(dataset, user_embeddings, folder)  # Recall itself helps to fit its weights
    settings = fitting.settings(settings)
    adds = fitting.left_out(settings)
    settings = fitting.again(settings, encode_users) if encode_users else settings
    (folder / "recall.json").write_text(settings.to_json())
    return RecallFacts(tuned.tried, fitting.tried, fitting.tried_quotas, adds)


@dataclass(frozen=True)
class RecallFacts:
    """Holds what the report says of recall: rows of settings, of sources that were tried, quotas that were,
    rows of sources."""

    tried: list[dict[str, Any]]
    tried_sources: list[dict[str, Any]]
    tried_quotas: dict[str, Any]
    sources: list[dict[str, Any]]


def _popularity(dataset: Dataset, item_rows: Array) -> Array:
    """Gives log(1 + events) of each item [I + 1] float32 by the events' item_rows [P].

    What nobody has taken, and row 0, which stands for items that come later, has 0, or the median of the
    others where the shop says so: that nobody could take an item yet says nothing against it.
    """
    counts = np.bincount(item_rows, minlength=dataset.num_items + 1)
    counts[0] = 0
    popularity = np.log1p(counts).astype(np.float32)
    if dataset.schema.new_items == "median" and counts.any():
        popularity[counts == 0] = np.median(popularity[counts > 0])
    return popularity


def _quotas(schema: Schema) -> dict[str, int]:
    """Gives the places among the N candidates that are kept for each source with a quota."""
    return {s.name: int(schema.sizes.candidates * s.quota) for s in schema.sources if s.quota is not None}


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

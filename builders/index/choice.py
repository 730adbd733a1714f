"""Chooses a Faiss index by catalogue size and memory, and tunes how it is asked against exact search.

What kind it is (IndexKind) and how it is asked (ensemble.index.main_index.QuerySettings) are apart: one
build is tried with many settings, and the table of what was tried goes into the report.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.index.found import recall_share
from ensemble.index.main_index import MainIndex, QuerySettings
from ensemble.index.vectors import Precision, Vectors, packed_vectors, vector_dtype

Chunks = Callable[
    [int, int], Array
]  # start, stop -> embeddings [stop - start, D] float32 of item rows start + 1 … stop
FLAT_BELOW = 100_000  # items; above, a full scan costs more than it finds
COMPRESSED_FROM = 2_000_000  # items; below, the flat vectors of an IVF index are a gigabyte at most
_ID_BYTES = 8  # of each item in an IVF list
_FACTORS = (2, 4, 8, 16, 32, 64, 128)
_POINTS_A_LIST = 64  # training sample
_ADDED = 1 << 18  # items encoded at once: 128 MB


@dataclass(frozen=True)
class IndexKind:
    """Says how an index is built: Faiss's factory string, and what an item takes in it."""

    factory: str  # Faiss's name for it
    bytes_per_item: int  # of the index itself, without the mapped vectors
    num_lists: int = 1
    refined: bool = False
    precision: Precision = "fp16"  # of the mapped vectors
    seed: int = 0


@dataclass(frozen=True)
class IndexTarget:
    """Says what the settings are tuned for."""

    recall_at_k: float = 0.98
    k: int = 100


@dataclass(frozen=True)
class TunedIndex:
    """Holds a finished index, how to ask it, and what else was tried: one row a setting."""

    index: faiss.Index
    query: QuerySettings
    tried: list[dict[str, Any]]


def choose_kind(
    num_items: int, dim: int, budget_bytes: int | None = None, *, precision: Precision = "fp16", seed: int = 0
) -> IndexKind:
    """Chooses the most exact index within `budget_bytes`; None: flat to a gigabyte, then a twentieth."""
    lists = 1 << max(4, int(np.log2(2 * np.sqrt(max(1, num_items)))))
    budget = (
        budget_bytes
        if budget_bytes is not None
        else 4 * dim * COMPRESSED_FROM
        if num_items <= COMPRESSED_FROM
        else 4 * dim * num_items // 20
    )
    flat = IndexKind("Flat", 4 * dim, seed=seed)
    pieces = [m for m in (dim, dim // 2, dim // 4, dim // 8) if m >= 1 and dim % m == 0]
    kinds = [
        flat
        if num_items < FLAT_BELOW
        else IndexKind(f"IVF{lists},Flat", 4 * dim + _ID_BYTES, lists, seed=seed),
        IndexKind(f"IVF{lists},RaBitQ", dim // 8 + 8 + _ID_BYTES, lists, True, precision, seed),
        *(
            IndexKind(f"IVF{lists},PQ{m}x4fsr", m // 2 + _ID_BYTES, lists, True, precision, seed)
            for m in pieces[1:]
        ),
    ]
    fitting = sorted(
        (kind for kind in kinds if _total_bytes(kind, num_items, dim) <= budget),
        key=lambda kind: -kind.bytes_per_item,
    )
    if not fitting:
        least = min(_total_bytes(kind, num_items, dim) for kind in kinds)
        raise InvalidInput(
            f"index memory {budget} bytes: {num_items} items of {dim} components need at least {least}; "
            "give more, or fewer components"
        )
    return fitting[0]


def _total_bytes(kind: IndexKind, num_items: int, dim: int) -> int:
    """Counts items, centroids, and half a block of 32 codes that each fast-scan list leaves empty."""
    return (
        kind.bytes_per_item * num_items
        + 4 * dim * kind.num_lists
        + (16 * kind.bytes_per_item * kind.num_lists if "fs" in kind.factory else 0)
    )


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


def index_of_kind(kind: IndexKind, num_items: int, dim: int, chunks: Chunks) -> faiss.Index:
    """Trains on a sample, then adds every item, piece by piece: the vectors are never all in memory."""
    index = faiss.index_factory(dim, kind.factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = (
            10,
            kind.seed + 1,
            2 * _POINTS_A_LIST,
        )
        index.train(
            sample(
                chunks,
                num_items,
                2 * _POINTS_A_LIST * kind.num_lists if not kind.refined else _POINTS_A_LIST * kind.num_lists,
                kind.seed,
            )
        )
    for start in range(0, num_items, _ADDED):
        index.add(chunks(start, min(start + _ADDED, num_items)))
    return index


def pack_vectors(path: Path, kind: IndexKind, num_items: int, dim: int, chunks: Chunks) -> None:
    """Writes every item's vector in the precision of its kind, piece by piece; row 0 stays empty."""
    dtype = vector_dtype(kind.precision, dim)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype.base, shape=(num_items + 1, *dtype.shape))
    for start in range(0, num_items, _ADDED):
        stop = min(start + _ADDED, num_items)
        out[start + 1 : stop + 1] = packed_vectors(chunks(start, stop), kind.precision)
    out.flush()


def sample(chunks: Chunks, num_items: int, size: int, seed: int) -> Array:
    """Samples about `size` vectors [n, D] in short runs: a single row of a mapped file costs a page."""
    if size >= num_items:
        return chunks(0, num_items)
    run = 64
    starts = (
        np.sort(np.random.default_rng(seed).choice(num_items // run, max(1, size // run), replace=False))
        * run
    )
    return np.concatenate([chunks(int(s), int(s) + run) for s in starts])


def exact_positions(queries: Array, k: int, num_items: int, chunks: Chunks) -> Array:
    """Finds the true best positions by inner product: [Q, k] int64."""
    best_scores, best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    for start in range(0, num_items, _ADDED):
        piece = faiss.IndexFlatIP(queries.shape[1])
        piece.add(chunks(start, min(start + _ADDED, num_items)))
        scores, positions = piece.search(queries, min(k, piece.ntotal))
        best_scores, best = (
            np.concatenate([best_scores, scores], axis=1),
            np.concatenate([best, positions + start], axis=1),
        )
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
        best_scores, best = (
            np.take_along_axis(best_scores, order, axis=1),
            np.take_along_axis(best, order, axis=1),
        )
    return best


def tune(
    index: faiss.Index, kind: IndexKind, vectors: Vectors, queries: Array, truth: Array, target: IndexTarget
) -> TunedIndex:
    """Finds the fastest settings that reach the target, or the most exact: one thread, query by query."""
    name, tried = f"recall_at_{target.k}", list[dict[str, Any]]()
    best: tuple[float, QuerySettings] | None = None
    for factor in _FACTORS if kind.refined else (0,):
        for nprobe in (1 << p for p in range(int(np.log2(kind.num_lists)) + 1)):
            settings = QuerySettings(nprobe, factor)
            row = try_settings(index, kind, vectors, queries, truth, settings)
            stalled = (
                bool(tried) and tried[-1]["refine_factor"] == factor and row[name] < tried[-1][name] + 0.002
            )
            tried.append(row)
            if row[name] >= target.recall_at_k:
                best = (
                    min(best, (row["ms_per_query"], settings), key=lambda b: b[0])
                    if best
                    else (row["ms_per_query"], settings)
                )
                break
            if stalled and nprobe >= 8:  # more lists find no more: it is the codes that lose
                break
            if best and row["ms_per_query"] > best[0]:
                break
    most_exact = max(tried, key=lambda row: (row[name], -row["ms_per_query"]))
    return TunedIndex(
        index, best[1] if best else QuerySettings(most_exact["nprobe"], most_exact["refine_factor"]), tried
    )


def try_settings(
    index: faiss.Index,
    kind: IndexKind,
    vectors: Vectors,
    queries: Array,
    truth: Array,
    settings: QuerySettings,
) -> dict[str, Any]:
    """Measures recall and milliseconds a query of one setting."""
    k, main = truth.shape[1], MainIndex(index, vectors, settings)
    found, took = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(main.search(query[None], k)[0][0])
        took.append(time.perf_counter() - started)
    return {
        "index": kind.factory,
        "nprobe": settings.nprobe,
        "refine_factor": settings.refine_factor,
        f"recall_at_{k}": round(recall_share(np.stack(found), truth), 4),
        "ms_per_query": round(1000 * float(np.median(took)), 3),
        "bytes_per_item": kind.bytes_per_item,
        "mapped_bytes_per_item": vector_dtype(kind.precision, queries.shape[1]).itemsize
        if kind.refined
        else 0,
    }

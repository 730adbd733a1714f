"""Makes what the content source opens: what each code weighs, every item's vector, and an index over them.

The matrix of items by codes (categories and words; TF-IDF, rows of length 1) is cut to its leading directions
by a randomized singular value decomposition (Halko, Martinsson & Tropp, SIAM Review 2011, in torch). Numbers,
images and other vectors are left out: two items of one price are not alike.

Axes: I items, C code columns, E components.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from builders.data.dataset import Dataset, history_windows
from builders.data.splits import first_of_users
from builders.index.choice import build_index
from ensemble.arrays import Array
from ensemble.schema import Schema
from ensemble.steps.content import INDEX, TABLE, VECTORS, content_vectors

COMPONENTS = 128  # E: of a quarter of a kilobyte an item
_SAMPLE = 200_000  # items that the directions are learned from
_MORE, _ROUNDS = 16, 3  # directions beside those kept, and power iterations: what SVDs of words need
_PIECE = 1 << 16  # items


def write_content(dataset: Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """Writes the table, the vectors and the index; gives the settings of RecallSettings that go with them."""
    table = content_table(dataset.schema, dataset.item_codes, COMPONENTS, seed)
    np.save(folder / TABLE, table)
    shape = (dataset.num_items + 1, COMPONENTS)
    out = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(out), _PIECE):
        out[start : start + _PIECE] = content_vectors(table, dataset.item_codes[start : start + _PIECE])
    out[0] = 0
    out.flush()
    tuned, _ = build_index(out[1:], _queries(dataset, out), seed)
    faiss.write_index(tuned.index, str(folder / INDEX))
    return {
        "content_nprobe": tuned.query.nprobe,
        "content_refine_factor": tuned.query.refine_factor,
    }


def content_table(schema: Schema, codes: Array, dim: int, seed: int) -> Array:
    """Learns what each code weighs: codes [I + 1, C] int32 -> [codes, dim] float32.

    What is not in the vocabulary, or on every item, weighs nothing.
    """
    num_codes, codes = schema.items.num_codes, np.asarray(codes[1:])
    counts = np.bincount(codes.ravel(), minlength=num_codes)
    weights = np.log(np.maximum(len(codes), 1) / np.maximum(counts, 1)).astype(np.float32)
    weights[[0, *(f.offset for f in schema.items.features if f.is_code)]] = 0
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(codes))[:_SAMPLE])
    matrix = _sparse(codes[chosen], weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rank = min(dim + _MORE, *matrix.shape)
        directions = torch.svd_lowrank(matrix, q=rank, niter=_ROUNDS)[2][:, :dim].numpy()
    table = np.zeros((num_codes, dim), np.float32)
    table[:, : directions.shape[1]] = weights[:, None] * directions
    return table


def _sparse(codes: Array, weights: Array) -> torch.Tensor:
    """Gives items by codes as a sparse matrix [n, codes] with rows of length 1."""
    items, columns = np.nonzero(weights[codes])
    found = codes[items, columns]
    squares = np.bincount(items, weights[found] ** 2, minlength=len(codes))
    values = weights[found] / np.sqrt(np.maximum(squares, 1e-12))[items]
    places = torch.from_numpy(np.stack([items, found.astype(np.int64)]))
    shape = (len(codes), len(weights))
    numbers = torch.from_numpy(values.astype(np.float32))
    return torch.sparse_coo_tensor(places, numbers, shape, check_invariants=False).coalesce()


def _queries(dataset: Dataset, vectors: Array) -> Array:
    """Makes queries [Q, E] float32 as they will come: of held-out users, or of items where there are none."""
    held_out = dataset.validation
    firsts = first_of_users(held_out.user_rows, 1)[:512]
    rows = history_windows(
        dataset.histories,
        held_out.user_rows[firsts],
        held_out.history_ends[firsts],
        dataset.schema.sizes.history,
    )
    means = vectors[np.maximum(rows, 0)].astype(np.float32).mean(axis=1)
    known = means[means.any(axis=1)]
    return np.ascontiguousarray(known if len(known) else vectors[1:513], np.float32)

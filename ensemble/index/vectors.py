"""Reads memory-mapped vectors, with which a compressed index's finds are scored again: half or a quarter of
float32's bytes.

[I + 1] rows, row 0 unused. Half precision: a plain float16 array [I + 1, D]. int8: one record a row, its
codes and the number that they count in units of, so that row = codes * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

Vectors = Callable[[Array], Array]  # rows [...] int64 -> [..., D] float32
Precision = Literal["fp16", "int8"]


def vector_dtype(precision: Precision, embedding: int) -> np.dtype:
    """Gives the dtype of one row of the file."""
    if precision == "fp16":
        return np.dtype(("<f2", (embedding,)))
    return np.dtype([("codes", "i1", (embedding,)), ("scale", "<f4")])


def packed_vectors(vectors: Array, precision: Precision) -> Array:
    """Packs vectors [n, D] float32 into [n] rows of the file."""
    if precision == "fp16":
        return vectors.astype("<f2")
    out = np.zeros(len(vectors), vector_dtype(precision, vectors.shape[1]))
    out["scale"] = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / 127
    out["codes"] = np.rint(vectors / out["scale"][:, None])
    return out


def open_vectors(path: Path, num_rows: int, embedding: int) -> Vectors:
    """Opens the file at `path`; ReleaseError unless it holds `num_rows` vectors of `embedding` components."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"cannot open {path}: {error}; build the release again") from None
    kinds = {vector_dtype("fp16", embedding): "fp16", vector_dtype("int8", embedding): "int8"}
    row = np.dtype((table.dtype, table.shape[1:])) if table.ndim > 1 else table.dtype
    if row not in kinds or len(table) != num_rows:
        raise ReleaseError(
            f"{path}: {len(table)} rows of {row}; the release has {num_rows} of {embedding} components; "
            "build the release again"
        )
    if kinds[row] == "fp16":
        return lambda rows: table[rows].astype(np.float32)
    return lambda rows: _scaled(table[rows])


def _scaled(rows: Array) -> Array:
    """Unpacks int8 rows [...] into vectors [..., D] float32."""
    return rows["codes"].astype(np.float32) * rows["scale"][..., None]

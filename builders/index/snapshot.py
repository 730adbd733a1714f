"""Writes the snapshot's packed rows piece by piece: never twice in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, past_windows
from ensemble.arrays import Array
from ensemble.options import LATEST_S
from ensemble.release.snapshot import item_dtype, user_dtype

_PIECE = 1 << 16  # rows


def write_items(dataset: Dataset, embeddings: Array, features: Array | None, folder: Path) -> None:
    """Writes the items' packed rows; `features` [I + 1, F] are 0 until the ranker is trained."""
    dtype = item_dtype(dataset.schema)
    out = _mapped(folder / "items.npy", dtype, dataset.num_items + 1)
    for start in range(0, len(out), _PIECE):
        piece = slice(start, start + _PIECE)
        out["embedding"][piece], out["codes"][piece], out["values"][piece] = (
            embeddings[piece],
            dataset.item_codes[piece],
            dataset.item_values[piece],
        )
        if features is not None:
            out["features"][piece] = features[piece]
    out.flush()


def write_users(dataset: Dataset, features: Array, rates: Array, folder: Path) -> None:
    """Writes the users' packed rows with all that is known, held-out events too, but not a published test;
    features [U + 1, U'], rates [U + 1, user_rates]."""
    histories = dataset.histories
    out = _mapped(folder / "users.npy", user_dtype(dataset.schema), dataset.num_users + 1)
    for start in range(0, len(out), _PIECE):
        user_rows = np.arange(start, min(start + _PIECE, len(out)))
        ends = np.asarray(dataset.known_ends[user_rows])
        past = past_windows(histories, user_rows, ends, dataset.schema.sizes.seen)
        out["seen"][user_rows], out["seen_kinds"][user_rows] = past.rows, past.kinds
        out["seen_times"][user_rows] = np.clip(past.times, 0, LATEST_S - 1)
        for field, table in (
            ("codes", dataset.user_codes),
            ("values", dataset.user_values),
            ("features", features),
            ("rates", rates),
        ):
            out[field][user_rows] = table[user_rows]
    out.flush()


def _mapped(path: Path, dtype: np.dtype, num_rows: int) -> np.memmap:
    """Maps a new array whose space is there: a mapped write on a full disk ends the process by SIGBUS."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_rows,))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out

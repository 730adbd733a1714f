"""Writes the snapshot's packed rows piece by piece: never twice in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, past_windows
from ensemble.arrays import Array
from ensemble.options import LATEST_S
from ensemble.release.pasts import ENDS, MOST, ROWS, Older, ragged
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


def write_older(dataset: Dataset, folder: Path) -> None:
    """Writes what users had before the last W events of the known past, each item once a user: see
    ensemble/release/pasts.py."""
    ends, parts = np.zeros(dataset.num_users + 1, np.int64), [np.zeros(0, np.int32)]
    for start in range(0, dataset.num_users + 1, _PIECE):
        user_rows = np.arange(start, min(start + _PIECE, dataset.num_users + 1))
        found = older_pasts(dataset, user_rows, np.asarray(dataset.known_ends[user_rows]))
        key = np.unique(found.owners << 32 | found.rows)
        ends[user_rows] = np.bincount(key >> 32, minlength=len(user_rows))
        parts.append((key & 0xFFFFFFFF).astype(np.int32))
    np.save(folder / ENDS, np.cumsum(ends))
    np.save(folder / ROWS, np.concatenate(parts))


def older_pasts(dataset: Dataset, user_rows: Array, history_ends: Array) -> Older:
    """Gives what users [L] had before the last W events that end at `history_ends` [L]; of very long pasts
    the newest."""
    begin = np.asarray(dataset.histories.offsets[user_rows])
    stops = np.maximum(begin, history_ends - dataset.schema.sizes.seen)
    owners, places = ragged(np.maximum(begin, stops - MOST), stops)
    return Older(owners, np.asarray(dataset.histories.item_rows[places]).astype(np.int64))


def _mapped(path: Path, dtype: np.dtype, num_rows: int) -> np.memmap:
    """Maps a new array whose space is there: a mapped write on a full disk ends the process by SIGBUS."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num_rows,))
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out

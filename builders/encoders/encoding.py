"""Encodes any user at any point of the history with the trained user encoder."""

from __future__ import annotations

import numpy as np

from builders.data.dataset import Dataset, cell_windows, history_windows, training_histories
from builders.encoders.encoders import EncoderCheckpoint, encode_users
from builders.encoders.sequences import Sequences
from ensemble.arrays import Array

_PIECE = 1 << 20  # events at once


class UserEncoding:
    """Encodes any users at any point of the history: [L], [L] -> user_embeddings [L, M, D] float32."""

    def __init__(self, checkpoint: EncoderCheckpoint, dataset: Dataset, item_embeddings: Array) -> None:
        self.checkpoint, self.dataset, self.item_embeddings = checkpoint, dataset, item_embeddings

    def __call__(self, user_rows: Array, history_ends: Array) -> Array:
        histories, data = known_histories(self.dataset, user_rows, history_ends), self.dataset
        return encode_users(
            self.checkpoint,
            self.item_embeddings,
            histories,
            data.user_codes[user_rows],
            data.user_values[user_rows],
        )


def known_histories(dataset: Dataset, user_rows: Array, history_ends: Array) -> Sequences:
    """Gives the last H items of each history before its end, as sequences."""
    length = dataset.schema.sizes.history
    windows = history_windows(dataset.histories, user_rows, history_ends, length)
    cells, there = cell_windows(dataset, user_rows, history_ends, length), windows > 0
    return Sequences(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), windows[there], cells[there])


def training_sequences(dataset: Dataset) -> Sequences:
    """Gives the part of each history that may be trained on, as sequences."""
    offsets, rows = training_histories(dataset)
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    ends = dataset.histories.offsets[users] + np.arange(len(rows)) - offsets[users] + 1
    pieces = range(0, len(rows), _PIECE)
    cells = [cell_windows(dataset, users[at : at + _PIECE], ends[at : at + _PIECE], 1) for at in pieces]
    return Sequences(offsets, rows, np.concatenate([np.zeros((0, 1), np.int64), *cells])[:, 0])

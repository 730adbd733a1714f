"""Encodes any user at any point of the history with the trained user encoder."""

from __future__ import annotations

import numpy as np

from builders.data.dataset import Dataset, history_windows
from builders.encoders.encoders import EncoderCheckpoint, encode_users
from builders.encoders.sequences import Sequences
from ensemble.arrays import Array


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
    windows = history_windows(dataset.histories, user_rows, history_ends, dataset.schema.sizes.history)
    return Sequences(np.concatenate([[0], np.cumsum((windows > 0).sum(axis=1))]), windows[windows > 0])

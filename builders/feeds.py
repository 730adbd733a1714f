"""What models are fed outside of serving: histories up to any point, users' embeddings there, and real inputs for exported engines."""

from __future__ import annotations

import numpy as np

from builders.dataset import Dataset
from builders.encoders import EncoderCheckpoint, encode_users
from builders.index import OfflineRecall
from builders.ranker_data import history_windows
from builders.sequences import Sequences
from builders.train_ranker import RankerCheckpoint
from ensemble.arrays import Array

_CHECKED = 64  # users and items whose feeds the exported engines are checked on


class UserEncoding:
    """Torch's user encoder over any users at any point of the history: [L], [L] -> user_embeddings [L, M, D]."""

    def __init__(self, checkpoint: EncoderCheckpoint, dataset: Dataset, item_embeddings: Array) -> None:
        self.checkpoint, self.dataset, self.item_embeddings = checkpoint, dataset, item_embeddings

    def __call__(self, user_rows: Array, history_ends: Array) -> Array:
        histories, data = known_histories(self.dataset, user_rows, history_ends), self.dataset
        return encode_users(self.checkpoint, self.item_embeddings, histories, data.user_codes[user_rows], data.user_values[user_rows])


def known_histories(dataset: Dataset, user_rows: Array, history_ends: Array) -> Sequences:
    """The last H items of each history before its end, as sequences."""
    windows = history_windows(dataset.histories, user_rows, history_ends, dataset.schema.sizes.history)
    return Sequences(np.concatenate([[0], np.cumsum((windows > 0).sum(axis=1))]), windows[windows > 0])


def engine_feeds(dataset: Dataset, item_embeddings: Array, trained: RankerCheckpoint, id_rows: Array, recall: OfflineRecall) -> dict[str, Array]:
    """Real inputs of all engines, by tensor name: those of the first users, with recall's candidates, and of the first items.

    Random scores would not do: where the calibrated probabilities are all next to 0, the two sigmoids differ in most of their digits.
    """
    user_rows = np.arange(1, 1 + min(_CHECKED, dataset.num_users))
    ends = dataset.histories.offsets[user_rows + 1]
    windows = history_windows(dataset.histories, user_rows, ends, dataset.schema.sizes.history)
    candidates, scores = recall.candidates(user_rows, ends)
    (past, history), (known, candidates) = (((rows > 0)[..., None].astype(np.float32), np.maximum(rows, 0)) for rows in (windows, candidates))
    items = slice(1, 1 + _CHECKED)
    return {
        "history_embeddings": item_embeddings[history] * past,
        "history_features": trained.item_features[history] * past,
        "history_mask": windows > 0,
        "user_codes": np.asarray(dataset.user_codes[user_rows]),
        "user_values": np.asarray(dataset.user_values[user_rows]),
        "user_features": trained.user_features[user_rows],
        "candidate_features": trained.item_features[candidates] * known,
        "candidate_scores": scores,
        "item_codes": np.asarray(dataset.item_codes[items]),
        "item_values": np.asarray(dataset.item_values[items]),
        "item_id_embedding": id_rows[items],
    }

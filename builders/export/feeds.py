"""Makes real inputs on which exported engines are checked."""

from __future__ import annotations

import numpy as np

from builders.data.dataset import Dataset, cell_windows, history_windows, past_windows, some_contexts
from builders.export.trained import Trained
from builders.index.offline import OfflineRecall
from ensemble.activity import activity, recencies, touches
from ensemble.arrays import Array
from ensemble.context import context_state

_CHECKED = 64  # users and items whose feeds the exported engines are checked on


def engine_feeds(
    dataset: Dataset, item_embeddings: Array, trained: Trained, recall: OfflineRecall
) -> dict[str, Array]:
    """Gives real inputs of all engines, by tensor name: first users with recall's candidates, first items.

    Random scores would not do: where the calibrated probabilities are all next to 0, the two sigmoids differ
    in most of their digits.
    """
    user_rows = np.arange(1, 1 + min(_CHECKED, dataset.num_users))
    ends = dataset.histories.offsets[user_rows + 1]
    schema, ranker = dataset.schema, trained.ranker
    candidates, scores = recall.candidates(user_rows, ends)
    past = past_windows(dataset.histories, user_rows, ends, schema.sizes.seen)
    length = schema.sizes.history
    windows = history_windows(dataset.histories, user_rows, ends, length)
    cells = cell_windows(dataset, user_rows, ends, length)
    added = {field: rows.table()[cells] for field, rows in trained.events.items()}
    newest = np.maximum(past.times[:, -1], 0).astype(np.float64)
    near = recencies(schema, past.times, past.kinds, newest)
    context = context_state(schema, some_contexts(dataset, user_rows))
    state = [activity(schema, near, past.kinds), context, ranker.user_rates[user_rows]]
    # as for users who would have again what they had: else these would be 0 throughout
    touched = touches(schema, past.rows, near, past.kinds, np.resize(past.rows, candidates.shape))
    (there, history), (known, candidates) = (
        ((rows > 0)[..., None].astype(np.float32), np.maximum(rows, 0)) for rows in (windows, candidates)
    )
    items = slice(1, 1 + _CHECKED)
    return {
        "history_embeddings": item_embeddings[history] * there + added["embedding"],
        "history_features": ranker.item_features[history] * there + added["features"],
        "history_mask": windows > 0,
        "user_codes": np.asarray(dataset.user_codes[user_rows]),
        "user_values": np.asarray(dataset.user_values[user_rows]),
        "user_features": ranker.user_features[user_rows],
        "candidate_features": ranker.item_features[candidates] * known,
        "user_state": np.concatenate(state, axis=1),
        "candidate_state": touched,
        "candidate_scores": scores,
        "item_codes": np.asarray(dataset.item_codes[items]),
        "item_values": np.asarray(dataset.item_values[items]),
        "item_id_embedding": trained.item_id_embeddings[items],
    }

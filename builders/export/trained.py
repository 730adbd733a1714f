"""Opens what was trained: the torch modules that become engines, and the id rows that item_encoder reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from builders.data.dataset import open_schema
from builders.encoders.checkpoint import open_encoders
from builders.encoders.models import ItemRows
from builders.events import EventRows
from builders.folders import Inputs
from builders.ranker.checkpoint import RankerCheckpoint, open_ranker
from ensemble.arrays import Array


@dataclass(frozen=True)
class Trained:
    """Holds the modules of all engines and what was learned beside them."""

    modules: dict[str, nn.Module]  # by model: item_encoder, user_encoder, ranker
    item_id_embeddings: Array  # [I + 1, E] float32: what item_encoder reads of each item
    ranker: RankerCheckpoint
    events: dict[str, EventRows]  # what events add to their items' rows in a history, by field of these


def open_trained(inputs: Inputs, which: str = "") -> Trained:
    """Opens the checkpoints of the finished stages `encoders` and `ranker`; `which` is before their names."""
    schema = open_schema(inputs["data"])
    encoders = open_encoders(inputs[f"{which}encoders"], schema)
    ranker = open_ranker(inputs[f"{which}ranker"], schema)
    modules = {
        "item_encoder": ItemRows(encoders.item_encoder(), ranker.item_head, schema.sizes.embedding),
        "user_encoder": encoders.user_encoder(),
        "ranker": ranker.ranker,
    }
    id_rows = np.concatenate([encoders.item_ids, ranker.item_id_features], axis=1)
    events = {"embedding": encoders.event_rows(), "features": ranker.events}
    return Trained(modules, id_rows, ranker, events)

"""Gives real feeds of a release's engines: what they are checked, warmed up and timed on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble.arrays import Tensors
from ensemble.errors import ReleaseError
from ensemble.local import LocalPipeline
from ensemble.options import default_options
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease

Feeds = Tensors  # {input: [B, …]}


def real_feeds(release: ServedRelease, models: Sequence[ModelSpec], users: int = 0) -> dict[str, Feeds]:
    """Gives {model: its inputs} for `users` users with a past, as the steps before it give them.

    The users are spread over the shop; 0 = as many as the largest batch.
    """
    rows = users or release.pipeline.max_batch
    # left-padded: the last place is the first to be filled
    known = np.flatnonzero(release.users["seen"][:, -1] > 0)
    if not len(known):
        raise ReleaseError(
            f"release {release.name} has no user with a past, on whose feeds its engines could be checked"
        )
    chosen = release.user_ids.ids_from_rows(known[np.linspace(0, len(known) - 1, rows).astype(np.int64)])
    tensors: Feeds = {"user_id": chosen[:, None]}
    steps = LocalPipeline(release).steps
    for model in release.pipeline.models:
        tensors.update(
            steps[model.name].run(default_options(rows), **{t.name: tensors[t.name] for t in model.inputs})
        )
    tensors.update(_items(release, rows))
    return {model.name: {t.name: tensors[t.name] for t in model.inputs} for model in models}


def _items(release: ServedRelease, rows: int) -> Feeds:
    """Gives the item encoder's inputs for items of the catalogue, each with the id row of a new item."""
    chosen = np.linspace(1, len(release.items) - 1, rows).astype(np.int64)
    release.verify_data("new_item_id_embedding.npy")
    new = np.load(release.path / "new_item_id_embedding.npy", allow_pickle=False)
    return {
        "item_id_embedding": np.repeat(new.reshape(1, -1), rows, axis=0).astype(np.float32),
        "item_codes": release.items["codes"][chosen],
        "item_values": release.items["values"][chosen],
    }

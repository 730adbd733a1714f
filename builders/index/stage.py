"""Stage `index`: turns item embeddings and training events into all that recall reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, open_dataset
from builders.encoders.checkpoint import open_encoders
from builders.encoders.encoders import encode_items
from builders.encoders.encoding import UserEncoding
from builders.folders import Inputs, link
from builders.index.offline import OfflineRecall
from builders.index.recall_files import write_recall
from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.index.item_index import VECTORS
from ensemble.index.probe import BASELINE
from ensemble.live.encoding import ENCODING
from ensemble.release.ids import write_ids

_FROM_DATA = {  # this stage's name of a file -> the data stage's
    "schema.json": "schema.json",
    "vocabularies.json": "vocabularies.json",
    ENCODING: "encoding.json",
    "numbers.npy": "item_numbers.npy",
}
# what a release takes from this stage as it is; only a compressed index has vectors
SERVED_FILES = (
    *_FROM_DATA, "item_ids.npy", "index.faiss", "transitions.npy", "popular.npy", "recall.json", BASELINE,
)  # fmt: skip
OPTIONAL_FILES = (VECTORS,)


@dataclass(frozen=True)
class Options:
    """Holds what the index may choose."""

    seed: int
    index_bytes: int | None  # memory of the main index; None: the default for the catalogue's size


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Writes the item embeddings, the index over them and everything else that recall reads."""
    dataset = open_dataset(inputs["data"])
    encoders = open_encoders(inputs["encoders"], dataset.schema)
    item_embeddings = encode_items(encoders, dataset.item_codes, dataset.item_values)
    np.save(folder / "item_embeddings.npy", item_embeddings)
    progress(0.2, "embedding held-out users")
    held_out = dataset.validation
    encode_users = UserEncoding(encoders, dataset, item_embeddings)
    user_embeddings = encode_users(held_out.user_rows, held_out.history_ends)
    progress(0.4, "index, transitions, popular, weights of the sources")
    for name, source in _FROM_DATA.items():
        link(inputs["data"] / source, folder / name)
    write_ids(folder / "item_ids.npy", dataset.item_ids)
    tried = write_recall(dataset, item_embeddings, user_embeddings, folder, options.seed, options.index_bytes)
    (folder / "tried.json").write_text(json.dumps(tried))


def open_recall(inputs: Inputs, dataset: Dataset) -> tuple[OfflineRecall, Array]:
    """Opens what this stage wrote: recall for any user at any time, and item_embeddings [I + 1, D]."""
    path = inputs["index"] / "item_embeddings.npy"
    item_embeddings = np.load(path, mmap_mode="c")  # private and writable, as torch wants it
    encoders = open_encoders(inputs["encoders"], dataset.schema)
    encode_users = UserEncoding(encoders, dataset, item_embeddings)
    return OfflineRecall(dataset, inputs["index"], encode_users), item_embeddings

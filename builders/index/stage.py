"""Stage `index`: turns item embeddings and training events into all that recall reads.

In a refit the sources weigh what they weigh in the verified model: the rows that would tell better are
trained on by then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, open_dataset
from builders.encoders.checkpoint import open_encoders
from builders.encoders.encoders import encode_items
from builders.encoders.encoding import UserEncoding
from builders.folders import Inputs, link
from builders.index.choice import IndexTarget
from builders.index.offline import OfflineRecall
from builders.index.recall_files import write_recall
from builders.index.sources import FILES
from builders.index.staged import SOURCES_FILE
from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.index.item_index import VECTORS
from ensemble.index.probe import BASELINE
from ensemble.live.encoding import ENCODING
from ensemble.release.ids import write_ids
from ensemble.steps.recall_settings import RecallSettings, settings_from_json

_FROM_DATA = {  # this stage's name of a file -> the data stage's
    "schema.json": "schema.json",
    "vocabularies.json": "vocabularies.json",
    ENCODING: "encoding.json",
    "numbers.npy": "item_numbers.npy",
}
# what a release takes from this stage as it is; only a compressed index has vectors, some shops more sources
SERVED_FILES = (
    *_FROM_DATA, "item_ids.npy", "index.faiss", "transitions.npy", "popular.npy", "recall.json", BASELINE,
)  # fmt: skip
OPTIONAL_FILES = (VECTORS, *FILES)
_LOST_RECALL = 0.01  # what a refit's index may find less


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
    verified = inputs.get("verified_index")
    settings = None if verified is None else _settings(verified)
    facts = write_recall(
        dataset,
        item_embeddings,
        user_embeddings,
        folder,
        options.seed,
        options.index_bytes,
        settings,
        encode_users,
    )
    tried, quotas = facts.tried, _settings(folder).quotas
    progress(0.95, "places of their own: " + ", ".join(f"{name} {of}" for name, of in quotas.items()))
    (folder / "tried.json").write_text(json.dumps(tried))
    if verified is None:
        told = {name: getattr(facts, name) for name in ("tried_sources", "tried_quotas", "sources")}
        (folder / SOURCES_FILE).write_text(json.dumps(told))
    else:
        link(verified / SOURCES_FILE, folder / SOURCES_FILE)
    if verified is not None:
        _require_recall(tried, json.loads((verified / "tried.json").read_text()))


def _settings(folder: Path) -> RecallSettings:
    """Reads what this stage chose in another run."""
    return settings_from_json((folder / "recall.json").read_text())


def _require_recall(tried: list[dict[str, Any]], verified: list[dict[str, Any]]) -> None:
    """Raises InvalidInput if the index finds less than it should, and less than the verified one."""
    (name, best), (_, before) = best_recall(tried), best_recall(verified)
    if best < min(IndexTarget().recall_at_k, before) - _LOST_RECALL:
        raise InvalidInput(
            f"the index of the refitted items finds {name} {best:.3f} at best; the verified one {before:.3f}",
            "give it more memory: --index-memory-mb",
        )


def best_recall(tried: list[dict[str, Any]]) -> tuple[str, float]:
    """Gives the name and the best value of the recall of the settings that were tried."""
    name = next(key for key in tried[0] if key.startswith("recall_at_"))
    return name, max(float(row[name]) for row in tried)


def open_recall(inputs: Inputs, dataset: Dataset) -> tuple[OfflineRecall, Array]:
    """Opens what this stage wrote: recall for any user at any time, and item_embeddings [I + 1, D]."""
    path = inputs["index"] / "item_embeddings.npy"
    item_embeddings = np.load(path, mmap_mode="c")  # private and writable, as torch wants it
    encoders = open_encoders(inputs["encoders"], dataset.schema)
    encode_users = UserEncoding(encoders, dataset, item_embeddings)
    return OfflineRecall(dataset, inputs["index"], encode_users), item_embeddings

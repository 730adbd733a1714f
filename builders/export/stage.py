"""Stage `export`: turns checkpoints into ONNX models, and stages all that will be served in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from builders.content.contents import link_encoders
from builders.data.dataset import Dataset, open_dataset
from builders.export.feeds import engine_feeds
from builders.export.onnx_export import export_model, reweight_model
from builders.export.trained import Trained, open_trained
from builders.folders import Inputs, link
from builders.index.snapshot import write_items, write_older, write_users
from builders.index.stage import OPTIONAL_FILES, SERVED_FILES, open_recall
from builders.progress import Progress, part_of
from builders.ranker.positions import POSITIONS
from builders.search.files import write_search_files
from ensemble import contract
from ensemble.arrays import Array
from ensemble.release.events import events_file
from ensemble.release.ids import write_ids
from ensemble.steps.blend import BLEND


def run(inputs: Inputs, options: None, folder: Path, progress: Progress) -> None:
    """Writes the staged release: the engines, the rows of items and users, and all that recall reads."""
    dataset, trained = open_dataset(inputs["data"]), open_trained(inputs)
    _link_files(inputs, folder)
    recall, item_embeddings = open_recall(inputs, dataset)
    feeds = engine_feeds(dataset, item_embeddings, trained, recall)
    errors = _export_engines(dataset, trained, feeds, folder, progress, inputs)
    progress(0.75, "rows of items and users")
    _write_rows(dataset, trained, item_embeddings, folder, part_of(progress, 0.8, 1.0))
    (folder / "export.json").write_text(json.dumps({"largest_relative_error_against_torch": errors}))


def without_engines(inputs: Inputs, folder: Path) -> Trained:
    """Writes all of the staged release but the engines, and gives what was trained in their place."""
    dataset, trained = open_dataset(inputs["data"]), open_trained(inputs)
    _link_files(inputs, folder)
    _, item_embeddings = open_recall(inputs, dataset)
    _write_rows(dataset, trained, item_embeddings, folder)
    return trained


def _link_files(inputs: Inputs, folder: Path) -> None:
    """Links what other stages wrote as it will be served."""
    index = inputs["index"]
    for name in (*SERVED_FILES, *(name for name in OPTIONAL_FILES if (index / name).exists())):
        link(index / name, folder / name)
    link(inputs["ranker"] / BLEND, folder / BLEND)
    if (inputs["ranker"] / POSITIONS).exists():  # for those who ask about exposures of the past
        link(inputs["ranker"] / POSITIONS, folder / POSITIONS)
    link_encoders(inputs["data"], folder)


def _export_engines(
    dataset: Dataset,
    trained: Trained,
    feeds: dict[str, Array],
    folder: Path,
    progress: Progress,
    inputs: Inputs,
) -> dict[str, float]:
    """Writes engines/MODEL/model.onnx of each; returns the largest relative error against torch by model."""
    verified = open_trained(inputs, "verified_") if "verified_export" in inputs else None
    schema, pipeline = dataset.schema, contract.recommend(dataset.schema)
    models = (contract.item_encoder(schema), pipeline.model("user_encoder"), pipeline.model("ranker"))
    errors = {}
    for step, model in enumerate(models):
        progress(step / 4, f"{model.name} -> ONNX")
        file = Path("engines") / model.name / "model.onnx"
        path, module = folder / file, trained.modules[model.name]
        path.parent.mkdir(parents=True)
        if verified is None:
            errors[model.name] = export_model(module, model, path, feeds)
        else:
            exported = inputs["verified_export"] / file
            errors[model.name] = reweight_model(
                module, verified.modules[model.name], exported, model, path, feeds
            )
    return errors


def _write_rows(
    dataset: Dataset,
    trained: Trained,
    item_embeddings: Array,
    folder: Path,
    progress: Progress = lambda share, text: None,
) -> None:
    """Writes the snapshot's rows of items and users, their ids and titles, and a new item's id row."""
    write_items(dataset, item_embeddings, trained.ranker.item_features, folder)
    write_users(dataset, trained.ranker.user_features, trained.ranker.user_rates, folder)
    for field, events in trained.events.items():
        if (table := events.table()).any():
            np.save(events_file(folder, field), table)
    write_older(dataset, folder)
    write_search_files(dataset, folder, progress)
    write_ids(folder / "user_ids.npy", dataset.user_ids)
    np.save(folder / "item_titles.npy", dataset.item_titles)
    np.save(folder / "new_item_id_embedding.npy", trained.item_id_embeddings[:1])

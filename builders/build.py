"""The whole build, top to bottom: a shop's folder in, a release in the model repository out.

    data -> encoders -> index -> ranker -> export -> compress -> verify -> repository

The ranker learns from what recall offers, so the index comes before it; engines are exported when all
training is done, and compressed, where a recipe says so, on the very release that was exported.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from builders.compress.recipe import NO_RECIPE, Recipe, facts
from builders.compress.source import Source
from builders.compress.stage import compress
from builders.data.dataset import Dataset, open_dataset, save_dataset
from builders.data.stage import load_dataset
from builders.encoders.checkpoint import read_encoders, save_encoders
from builders.encoders.encoders import Validation, encode_items
from builders.encoders.encoding import UserEncoding, known_histories
from builders.encoders.models import ItemRows
from builders.encoders.sequences import Sequences
from builders.encoders.stage import train_encoders
from builders.export.feeds import engine_feeds
from builders.export.stage import export_model
from builders.folders import link
from builders.index.offline import OfflineRecall
from builders.index.snapshot import write_items, write_users
from builders.index.stage import training_histories, write_recall
from builders.own_model import own_model
from builders.presets import Preset, encoder_config
from builders.progress import Progress
from builders.publish.stage import next_release_name, publish, sweep
from builders.publish.triton_config import write_members
from builders.ranker.checkpoint import read_ranker, save_ranker
from builders.ranker.stage import RankerCheckpoint, train_ranker
from builders.stages import Done, Stages, module_digest, shop_digest, stages_of
from builders.verify import markdown as reports
from builders.verify.stage import Verifier, ranking_report
from ensemble import contract
from ensemble.arrays import Array
from ensemble.index.item_index import VECTORS
from ensemble.index.probe import BASELINE
from ensemble.live.encoding import ENCODING
from ensemble.release.ids import write_ids
from ensemble.schema import Schema, schema_from_json

_ARRAYS = ("index.faiss", "transitions.npy", "popular.npy", "numbers.npy", "item_ids.npy")
_FROM_INDEX = (*_ARRAYS, "recall.json", "schema.json", "vocabularies.json", ENCODING, BASELINE)
# users x items ranked for early stopping: all users of Beauty, a thousand of a million items
_RANKED_PAIRS = 300_000_000


@dataclass(frozen=True)
class BuildOptions:
    """What `peregrine build` was asked for."""

    shop: Path
    repository: Path
    preset: Preset
    release: str | None = None  # None: the next free rN
    seed: int = 0
    user_encoder: str | None = None  # the user's own, "module:Class"
    ranker: str | None = None
    recipe: Recipe = NO_RECIPE
    recipe_name: str = "none"
    # memory of the main index; None: index_choice's default for the catalogue's size
    index_bytes: int | None = None


def build(options: BuildOptions, console: Console) -> tuple[str, Stages]:
    """Runs all stages; returns the new release's name and the stages, for the closing table."""
    options.repository.mkdir(parents=True, exist_ok=True)
    sweep(options.repository)
    name = options.release or next_release_name(options.repository)
    stages = stages_of(options.repository, options.shop, console)
    data, encoders, index, ranker, export = _run_to_export(options, stages)
    final = export
    if not options.recipe.is_empty:
        final = stages.run(
            "compress",
            lambda *to: make_smaller(options, data, encoders, ranker, export, *to),
            facts(options.recipe),
            (export,),
        )
    verify = stages.run("verify", lambda *to: make_report(data, index, ranker, final, *to), None, (final,))
    stages.run(
        "repository",
        lambda *to: make_release(options, name, final, verify, *to),
        None,
        (verify,),
        always=True,
    )
    return name, stages


def uncompressed(options: BuildOptions, console: Console) -> Source:
    """What `compress` starts from, out of the finished stages of the same build; those that are missing are
    run."""
    data, encoders, _, ranker, export = _run_to_export(
        options, stages_of(options.repository, options.shop, console)
    )
    return _source(options, data, encoders, ranker, export)


def _run_to_export(options: BuildOptions, stages: Stages) -> tuple[Done, Done, Done, Done, Done]:
    """All that is trained and exported: (data, encoders, index, ranker, export)."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.preset.threads or torch.get_num_threads())
    p = options.preset
    sizes, encoder_options, ranker_options = (
        dataclasses.asdict(part) for part in (p.sizes, p.encoders, p.ranker)
    )
    own_encoder, own_ranker = module_digest(options.user_encoder), module_digest(options.ranker)

    data = stages.run("data", lambda *to: make_data(options, *to), [shop_digest(options.shop), sizes])
    for source, model in ((options.user_encoder, "user_encoder"), (options.ranker, "ranker")):
        _own(source, _schema(data.folder), model)  # refused now, not after an hour of training
    encoders = stages.run(
        "encoders",
        lambda *to: make_encoders(options, data, *to),
        [encoder_options, own_encoder, options.seed],
        (data,),
    )
    index = stages.run(
        "index",
        lambda *to: make_index(options, data, encoders, *to),
        [options.seed, options.index_bytes],
        (encoders,),
    )
    ranker = stages.run(
        "ranker",
        lambda *to: make_ranker(options, data, encoders, index, *to),
        [ranker_options, own_ranker, options.seed],
        (index,),
    )
    export = stages.run(
        "export", lambda *to: make_engines(options, data, encoders, index, ranker, *to), None, (ranker,)
    )
    return data, encoders, index, ranker, export


def make_data(options: BuildOptions, folder: Path, progress: Progress) -> None:
    """Shop files -> dataset arrays."""
    save_dataset(
        load_dataset(options.shop, sizes=options.preset.sizes, progress=lambda text: progress(0.3, text)),
        folder,
    )


def make_encoders(options: BuildOptions, data: Done, folder: Path, progress: Progress) -> None:
    """Histories up to the split -> item encoder and user encoder."""
    dataset = open_dataset(data.folder)
    config = encoder_config(options.preset.encoders, dataset.schema)
    checkpoint = train_encoders(
        Sequences(*training_histories(dataset)),
        *_features(dataset),
        config=config,
        seed=options.seed,
        validation=_validation(dataset),
        user_encoder=_own(options.user_encoder, dataset.schema, "user_encoder"),
        progress=lambda log: progress(
            log["epoch"] / config.epochs, ", ".join(f"{name} {value:.4g}" for name, value in log.items())
        ),
    )
    save_encoders(checkpoint, folder)


def make_index(options: BuildOptions, data: Done, encoders: Done, folder: Path, progress: Progress) -> None:
    """Item embeddings -> the index and everything else that recall reads."""
    dataset = open_dataset(data.folder)
    checkpoint = read_encoders(encoders.folder, _own(options.user_encoder, dataset.schema, "user_encoder"))
    item_embeddings = encode_items(checkpoint, dataset.item_codes, dataset.item_values)
    np.save(folder / "item_embeddings.npy", item_embeddings)
    progress(0.2, "embedding held-out users")
    user_embeddings = _user_encoding(options, dataset, encoders, item_embeddings)(
        dataset.validation.user_rows, dataset.validation.history_ends
    )
    progress(0.4, "index, transitions, popular, weights of the sources")
    tried = write_recall(dataset, item_embeddings, user_embeddings, folder, options.seed, options.index_bytes)
    (folder / "tried.json").write_text(json.dumps(tried))


def make_ranker(
    options: BuildOptions, data: Done, encoders: Done, index: Done, folder: Path, progress: Progress
) -> None:
    """Impressions, or recall's own candidates -> the ranker and the learned rows of users and items."""
    dataset, item_embeddings = open_dataset(data.folder), np.load(index.folder / "item_embeddings.npy")
    offline = OfflineRecall(
        dataset, index.folder, _user_encoding(options, dataset, encoders, item_embeddings)
    )
    trained = train_ranker(
        dataset,
        item_embeddings,
        scores=offline.scores if dataset.train_impressions is None else offline.popular_scores,
        candidates=offline.candidates,
        source_weights=offline.recall.settings.source_weights,
        config=options.preset.ranker,
        ranker=_own(options.ranker, dataset.schema, "ranker"),
        seed=options.seed,
        progress=progress,
    )
    save_ranker(trained, folder)


def make_engines(
    options: BuildOptions,
    data: Done,
    encoders: Done,
    index: Done,
    ranker: Done,
    folder: Path,
    progress: Progress,
) -> None:
    """Checkpoints -> ONNX engines, and the staged release: all that will be served, in one folder."""
    dataset = open_dataset(data.folder)
    schema, pipeline = dataset.schema, contract.recommend(dataset.schema)
    modules, id_rows, trained = _trained(options, schema, encoders, ranker)
    for name in (
        *_FROM_INDEX,
        *([VECTORS] if (index.folder / VECTORS).exists() else []),
    ):  # only a compressed index has vectors
        link(index.folder / name, folder / name)
    errors = {}
    item_embeddings = np.load(index.folder / "item_embeddings.npy", mmap_mode="r")
    recall = OfflineRecall(dataset, index.folder, _user_encoding(options, dataset, encoders, item_embeddings))
    feeds = engine_feeds(dataset, item_embeddings, trained, id_rows, recall)
    for step, model in enumerate(
        (contract.item_encoder(schema), pipeline.model("user_encoder"), pipeline.model("ranker"))
    ):
        progress(step / 4, f"{model.name} -> ONNX")
        (folder / "engines" / model.name).mkdir(parents=True)
        errors[model.name] = export_model(
            modules[model.name], model, folder / "engines" / model.name / "model.onnx", feeds
        )
    progress(0.75, "rows of items and users")
    write_items(dataset, item_embeddings, trained.item_features, folder)
    write_users(dataset, trained.user_features, folder)
    write_ids(folder / "user_ids.npy", dataset.user_ids)
    np.save(folder / "item_titles.npy", dataset.item_titles)
    np.save(folder / "new_item_id_embedding.npy", id_rows[:1])
    (folder / "export.json").write_text(json.dumps({"largest_relative_error_against_torch": errors}))


def make_smaller(
    options: BuildOptions,
    data: Done,
    encoders: Done,
    ranker: Done,
    export: Done,
    folder: Path,
    progress: Progress,
) -> None:
    """The staged release -> the same with compressed engines, held against it by the gate; compress.json says
    how."""
    compress(
        _source(options, data, encoders, ranker, export),
        options.recipe,
        options.recipe_name,
        folder,
        progress,
    )


def make_report(
    data: Done, index: Done, ranker: Done, export: Done, folder: Path, progress: Progress
) -> None:
    """The staged release, asked about held-out users -> report.json and report.md."""
    dataset = open_dataset(data.folder)
    verifier = Verifier(dataset, export.folder)
    users, ranks = verifier.ranks(dataset.test, progress)
    found: dict[str, Any] = {"ranking": ranking_report(users, ranks, dataset.schema.sizes.candidates)}
    progress(0.9, "held-out impressions")
    if dataset.test_impressions is not None:
        found["tasks"] = verifier.task_metrics(dataset.test_impressions)
    found |= {
        "ranker": json.loads((ranker.folder / "report.json").read_text()),
        "export": json.loads((export.folder / "export.json").read_text()),
    }
    found |= {
        "recall": {
            **dataclasses.asdict(verifier.recall.settings),
            "tried": json.loads((index.folder / "tried.json").read_text()),
        }
    }
    if (export.folder / "compress.json").exists():
        found["compress"] = json.loads((export.folder / "compress.json").read_text())
    (folder / "report.json").write_text(json.dumps(found, indent=1))
    (folder / "report.md").write_text(reports.markdown(dataset, found))


def make_release(
    options: BuildOptions, name: str, export: Done, verify: Done, folder: Path, progress: Progress
) -> None:
    """The staged release and its report -> the model repository, whole or not at all."""
    schema = _schema(export.folder)
    pipeline, item_encoder = contract.recommend(schema), contract.item_encoder(schema)
    members = write_members(pipeline, [item_encoder], name, folder)
    for model in (*pipeline.models, item_encoder):
        for engine in sorted((export.folder / "engines" / model.name).glob("*.onnx")):
            link(engine, members[model.name] / "1" / engine.name)
    own = folder / name
    for path in (*export.folder.iterdir(), *verify.folder.iterdir()):
        if path.is_file() and path.name not in ("export.json", "compress.json"):
            link(path, own / path.name)
    progress(0.5, f"publishing {name}")
    found = json.loads((verify.folder / "report.json").read_text())
    manifest = {
        "shop": schema.shop,
        "preset": options.preset.name,
        "seed": options.seed,
        "contract": contract.fingerprint(schema),
        "report": found,
    }
    publish(options.repository, name, members, own, manifest)


def _source(options: BuildOptions, data: Done, encoders: Done, ranker: Done, export: Done) -> Source:
    dataset = open_dataset(data.folder)
    modules, id_rows, _ = _trained(options, dataset.schema, encoders, ranker)
    return Source(dataset, export.folder, modules, id_rows, options.preset.ranker.model)


def _trained(
    options: BuildOptions, schema: Schema, encoders: Done, ranker: Done
) -> tuple[dict[str, nn.Module], Array, RankerCheckpoint]:
    """(the engines' modules by model, id rows [I + 1, E] that item_encoder reads, the ranker's checkpoint) of
    finished stages."""
    checkpoint = read_encoders(encoders.folder, _own(options.user_encoder, schema, "user_encoder"))
    trained = read_ranker(
        ranker.folder, schema, options.preset.ranker.model, _own(options.ranker, schema, "ranker")
    )
    item_encoder = ItemRows(checkpoint.item_encoder(), trained.item_head, schema.sizes.embedding)
    id_rows = np.concatenate([checkpoint.item_ids, trained.item_id_features], axis=1)
    return (
        {"item_encoder": item_encoder, "user_encoder": checkpoint.user_encoder(), "ranker": trained.ranker},
        id_rows,
        trained,
    )


def _user_encoding(
    options: BuildOptions, dataset: Dataset, encoders: Done, item_embeddings: Array
) -> UserEncoding:
    checkpoint = read_encoders(encoders.folder, _own(options.user_encoder, dataset.schema, "user_encoder"))
    return UserEncoding(checkpoint, dataset, item_embeddings)


def _validation(dataset: Dataset) -> Validation | None:
    targets = dataset.validation
    if not len(targets.user_rows):
        return None
    most = max(1000, _RANKED_PAIRS // dataset.num_items)
    chosen = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:most])
    users, ends = targets.user_rows[chosen], targets.history_ends[chosen]
    return Validation(known_histories(dataset, users, ends), targets.item_rows[chosen], users)


def _features(dataset: Dataset) -> tuple[Array, Array, Array, Array]:
    return dataset.item_codes, dataset.item_values, dataset.user_codes, dataset.user_values


def _own(source: str | None, schema: Schema, model: str) -> Any:
    return None if source is None else own_model(source, schema, contract.recommend(schema).model(model))


def _schema(folder: Path) -> Schema:
    return schema_from_json((folder / "schema.json").read_text())

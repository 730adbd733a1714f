"""Builds a release, top to bottom: a shop's folder in, a release in the model repository out.

Items are those of the shop's files with the changes that were made while older releases were served: what the
repository's catalogue log (ensemble.live.catalogue) says when the build begins.

    data -> encoders -> index -> ranker -> export -> compress -> verify -> repository

The ranker learns from what recall offers, so the index comes before it; engines are exported when all
training is done, and compressed, where a recipe says so, on the very release that was exported. Each stage
lies in its own folder: `builders/NAME/stage.py` has what is run here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import builders.compress.stage as compress
import builders.data.stage as data
import builders.encoders.stage as encoders
import builders.export.stage as export
import builders.index.stage as index
import builders.publish.stage as publish
import builders.ranker.stage as ranker
import builders.verify.stage as verify
from builders.compress.recipe import NO_RECIPE, Recipe
from builders.compress.source import Source, open_source
from builders.data.dataset import open_schema
from builders.keys import FileDigests, own_key, shop_digest
from builders.own_model import open_own
from builders.presets import Preset
from builders.shop.catalogue import write_changes
from builders.stages import Stage, Stages, stages_folder
from ensemble.release.release import UNREAD, Watermark
from ensemble.release.repository import sweep


@dataclass(frozen=True)
class BuildOptions:
    """Holds what `peregrine build` was asked for."""

    shop: Path
    repository: Path
    preset: Preset
    release: str | None = None  # None: the next free rN
    seed: int = 0
    user_encoder: str | None = None  # the user's own, "module:Class"
    ranker: str | None = None
    recipe: Recipe = NO_RECIPE
    recipe_name: str = "none"
    index_bytes: int | None = None  # memory of the main index; None: the default for the catalogue's size
    rehash: bool = False  # reads all files of the shop again, even those that look unchanged
    watermark: Watermark = UNREAD  # how far the build reads the catalogue's log


def table(options: BuildOptions) -> list[Stage]:
    """Lists the stages of a build in their order: what each runs, with what, and which others it reads."""
    preset, seed = options.preset, options.seed
    own_encoder, own_ranker = own_key(options.user_encoder), own_key(options.ranker)
    training = encoders.Options(preset.encoders, own_encoder, seed)
    ranking = ranker.Options(preset.ranker, own_ranker, seed)
    smaller = compress.Options(options.recipe, options.recipe_name)
    release = publish.Options(
        str(options.repository.resolve()), options.release, preset.name, seed, options.watermark
    )
    final = "export" if options.recipe.is_empty else "compress"
    stages = [
        Stage("data", data.run, preset.sizes, ("shop", "catalogue")),
        Stage("encoders", encoders.run, training, ("data",)),
        Stage("index", index.run, index.Options(seed, options.index_bytes), ("data", "encoders")),
        Stage("ranker", ranker.run, ranking, ("data", "encoders", "index")),
        Stage("export", export.run, None, ("data", "encoders", "index", "ranker")),
        Stage("compress", compress.run, smaller, ("data", "encoders", "ranker", "export")),
        Stage("verify", verify.run, None, ("data", "index", "ranker", final)),
        Stage("repository", publish.run, release, (final, "verify"), always=True),
    ]
    return [stage for stage in stages if stage.name != "compress" or final == "compress"]


def build(options: BuildOptions, console: Console) -> tuple[str, Stages]:
    """Runs all stages; returns the new release's name and the stages, for the closing table."""
    options.repository.mkdir(parents=True, exist_ok=True)
    sweep(options.repository, console.print)
    stages = _run(options, console, upto="repository")
    return publish.read_name(stages.done[-1].folder), stages


def uncompressed(options: BuildOptions, console: Console) -> Source:
    """Opens what `compress` starts from, out of the finished stages of the same build; missing ones are
    run."""
    stages = _run(options, console, upto="export")
    return open_source({name: folder for name, (_, folder) in stages.given.items()})


def _run(options: BuildOptions, console: Console, *, upto: str) -> Stages:
    """Runs the stages up to the one called `upto`; a wrong own model is refused before anything is
    trained."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.preset.threads or torch.get_num_threads())
    root = stages_folder(options.repository, options.shop)
    digests, stages = FileDigests(root / "digests.json", rehash=options.rehash), Stages(root, console)
    stages.give("shop", options.shop, shop_digest(options.shop, digests))
    digests.save()
    mark, file, digest = write_changes(options.repository, root)
    stages.give("catalogue", file, digest)
    for stage in table(replace(options, watermark=mark)):
        done = stages.run(stage)
        if stage.name == "data":
            if line := (done.folder / data.CHANGES).read_text():
                console.print(f"{line}; up to change {mark.sequence}")
            for source, model in ((options.user_encoder, "user_encoder"), (options.ranker, "ranker")):
                open_own(own_key(source), open_schema(done.folder), model)
        if stage.name == upto:
            break
    return stages

"""Builds a release, top to bottom: a shop's folder in, a release in the model repository out.

Items are those of the shop's files with the changes that were made while older releases were served: what the
repository's catalogue log (ensemble.live.catalogue) says when the build begins.

    data -> encoders -> index -> ranker -> export -> compress -> verify -> (the same once more, on all
    that is known: the refit) -> repository

The ranker learns from what recall offers, so the index comes before it; engines are exported when all
training is done, and compressed, where a recipe says so, on the very release that was exported. Each stage
lies in its own folder: `builders/NAME/stage.py` has what is run here. `verify` measures the model that has
not seen the held-out rows; what is published has gone on from it with them (builders/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
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
import builders.verify.refit as refit_verify
import builders.verify.stage as verify
from builders.compress.recipe import NO_RECIPE, Recipe
from builders.compress.source import Source, open_source
from builders.content.contents import LINES
from builders.content.sources import encoder_digests
from builders.data.dataset import open_dataset, open_schema
from builders.data.refit import holds_out
from builders.keys import FileDigests, own_key, shop_digest
from builders.own_model import open_own
from builders.presets import Preset
from builders.settings import settings_of
from builders.shop.catalogue import write_changes
from builders.stages import REFIT, Stage, Stages, stages_folder
from ensemble.errors import InvalidInput
from ensemble.release.names import check_name, taken
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
    home: Path | None = None  # of the catalogue's log; None: the repository
    refit: bool | None = None  # None: as the preset says


def table(options: BuildOptions) -> list[Stage]:
    """Lists the stages of a build in their order: what each runs, with what, and which others it reads.

    The first half ends with the verified model, the second, the refit, does the same from there.
    """
    first, second = _training(options)
    judging = verify.Options(options.preset.boosting_rows)
    final = "export" if options.recipe.is_empty else "compress"
    again = f"{REFIT}{final}"
    stages = [
        Stage("data", data.run, options.preset.sizes, ("shop", "catalogue")),
        *first,
        Stage("verify", verify.run, judging, ("data", "encoders", "index", "ranker", final)),
        Stage("refit_data", data.refit, None, (), ("data",)),
        *second,
        Stage(
            "refit_verify",
            refit_verify.run,
            None,
            ("refit_data", "refit_encoders", "refit_index", "refit_ranker", again),
            ("data", final, "verify"),
        ),
    ]
    return [stage for stage in stages if final == "compress" or not stage.name.endswith("compress")]


def _training(options: BuildOptions) -> tuple[list[Stage], list[Stage]]:
    """Lists the stages between `data` and `verify`, and the same of the refit."""
    preset, seed = options.preset, options.seed
    training = encoders.Options(preset.encoders, own_key(options.user_encoder), seed)
    ranking = ranker.Options(preset.ranker, own_key(options.ranker), seed)
    smaller = compress.Options(options.recipe, options.recipe_name)
    indexing = index.Options(seed, options.index_bytes)
    exported = ("encoders", "ranker", "export")
    first = [
        Stage("encoders", encoders.run, training, ("data",), ("encoders",)),
        Stage("index", index.run, indexing, ("data", "encoders"), ("index",)),
        Stage("ranker", ranker.run, ranking, ("data", "encoders", "index"), ("ranker",)),
        Stage("export", export.run, None, ("data", "encoders", "index", "ranker"), exported),
        Stage("compress", compress.run, smaller, ("data", *exported)),
    ]
    second = [
        replace(stage, name=REFIT + stage.name, reads=tuple(REFIT + name for name in stage.reads))
        for stage in first
    ]
    return [replace(stage, verified=()) for stage in first], second


def publication(
    options: BuildOptions, *, is_refit: bool, why_not: str = "", stages_s: Mapping[str, float] | None = None
) -> Stage:
    """Gives the last stage: the refitted release's, or the verified one's."""
    final, before = "export" if options.recipe.is_empty else "compress", REFIT if is_refit else ""
    where, watermark = str(options.repository.resolve()), options.watermark
    release = publish.Options(
        where, options.release, options.preset.name, options.seed, watermark, is_refit, why_not,
        options.preset.changes, settings_of(options.preset), stages_s or {},
    )  # fmt: skip
    reads = (before + name for name in (final, "verify", "encoders", "ranker"))
    kept = ("data", final)  # `evaluate` asks the verified model
    return Stage("repository", publish.run, release, tuple(reads), kept, always=True)


def build(options: BuildOptions, console: Console) -> tuple[str, Stages]:
    """Runs all stages; returns the new release's name and the stages, for the closing table. A name that
    cannot be given is refused before anything is trained."""
    if options.release is not None:
        check_name(options.release)
    options.repository.mkdir(parents=True, exist_ok=True)
    sweep(options.repository, console.print)
    if options.release and (line := taken(options.repository, options.release)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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
    # the encoders that shop.toml names count as files of the shop
    facts = [*shop_digest(options.shop, digests), *encoder_digests(options.shop)]
    stages.give("shop", options.shop, facts)
    digests.save()
    mark, file, digest = write_changes(options.home or options.repository, root)
    stages.give("catalogue", file, digest)
    options = replace(options, watermark=mark)
    for stage in table(options):
        if stage.name.startswith(REFIT):
            break
        done = stages.run(stage)
        if stage.name == "data":
            if line := (done.folder / data.CHANGES).read_text():
                console.print(f"{line}; up to change {mark.sequence}")
            if lines := (done.folder / LINES).read_text():
                console.print(lines, markup=False, highlight=False, soft_wrap=True)
            for source, model in ((options.user_encoder, "user_encoder"), (options.ranker, "ranker")):
                open_own(own_key(source), open_schema(done.folder), model)
        if stage.name == upto:
            return stages
    why_not = _refit(options, stages)
    if why_not:
        console.print(f"the verified model is published, not a refit of it: {why_not}")
    took = {done.name: round(done.took_s, 2) for done in stages.done if done.took_s is not None}
    stages.run(publication(options, is_refit=not why_not, why_not=why_not, stages_s=took))
    return stages


def _refit(options: BuildOptions, stages: Stages) -> str:
    """Runs the stages of the refit; says why there is none to publish, or nothing."""
    if not (options.preset.refit if options.refit is None else options.refit):
        return "--no-refit" if options.refit is False else f"preset {options.preset.name} has none"
    if not holds_out(open_dataset(stages.given["data"][1])):
        return "nothing was held out, it has learned from all there is"
    try:
        for stage in table(options):
            if stage.name.startswith(REFIT):
                stages.run(stage)
    except InvalidInput as error:  # what the checks of the stages say; a full disk is no such thing
        return str(error)
    return ""

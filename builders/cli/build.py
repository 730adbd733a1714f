"""Reads what `peregrine build` was asked for, runs the build, and shows what came of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from builders.presets import Preset as PresetOfBuild
    from builders.stages import Stages

Preset = Annotated[
    str,
    typer.Option(
        help="Sizes and training: `tiny` (seconds, for demos and tests), `base` (real shops), `quick` "
        "(base's sizes, one epoch, for load tests), or a file NAME.toml that changes one of them."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change a setting of the preset, such as encoders.epochs=4; may be given often.",
    ),
]
ShowSettings = Annotated[
    bool, typer.Option("--show-settings", help="List all settings with their values, and end.")
]
Compress = Annotated[
    str,
    typer.Option(
        metavar="RECIPE",
        help="Compress the engines: `balanced`, `small`, `fast`, or a recipe (TOML file); a ranking "
        "metric is the gate.",
    ),
]
IndexMemory = Annotated[
    int | None,
    typer.Option(
        "--index-memory-mb",
        min=1,
        help="Memory of the item index; by default whole vectors up to 2 million items, then a twentieth of "
        "them.",
    ),
]

Rehash = Annotated[
    bool,
    typer.Option(
        "--rehash",
        help="Read all files of the shop again, even those whose size and time of change are as they were.",
    ),
]

Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        show_default=False,
        help="Once the held-out rows have judged the models, learn from them too, and publish that: the "
        "default, but for `quick`.",
    ),
]


def build(
    shop: Annotated[Path, typer.Argument(help="Folder of the shop: shop.toml and its tables.")],
    preset: Preset = "base",
    changes: Set = None,
    show_settings: ShowSettings = False,
    repository: Annotated[
        Path, typer.Option("--repository", "-r", help="Triton's model repository.")
    ] = REPOSITORY,
    release: Annotated[
        str | None, typer.Option(help="Name of the new release; the next free r1, r2, … if not given.")
    ] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Serve it from now on.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed, data and machine give the same release.")] = 0,
    user_encoder: Annotated[str | None, typer.Option(help="Your own user encoder, MODULE:CLASS.")] = None,
    ranker: Annotated[str | None, typer.Option(help="Your own ranker, MODULE:CLASS.")] = None,
    compress: Compress = "none",
    index_memory_mb: IndexMemory = None,
    rehash: Rehash = False,
    refit: Refit = None,
    catalogue: CatalogueOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Builds a release: data, encoders, index, ranker, export, compress, verify, a refit on all, repository.

    Stages whose inputs, options and code are unchanged are skipped, so a killed build goes on where it was:

        peregrine shop generate shops/demo
        peregrine build shops/demo --preset tiny --activate
    """
    # read when torch is imported; spinning threads make a busy machine ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from builders.settings import named_preset

    chosen = named_preset(preset, changes)
    if show_settings:
        _show_settings(chosen, as_json)
        return
    from builders.build import BuildOptions, build
    from builders.compress.recipe import read_recipe
    from builders.publish.stage import was_there

    console = Console(stderr=True)
    options = BuildOptions(
        shop,
        repository,
        chosen,
        release,
        seed,
        user_encoder,
        ranker,
        recipe=read_recipe(compress),
        recipe_name=compress,
        index_bytes=index_memory_mb and index_memory_mb * 1_000_000,
        rehash=rehash,
        refit=refit,
        home=catalogue,
    )
    name, stages = build(options, console)
    if activate:
        from clients.operations.releases import activate as activate_release

        done = activate_release(repository, name, home=catalogue)
        for line in filter(None, (done.worth, *done.notes)):
            console.print(line)
    if as_json:
        print(
            json_text(
                {
                    "release": name,
                    "was_there": was_there(stages.done[-1].folder),
                    "active": activate,
                    **_facts(stages),
                    "report": json.loads((repository / name / "report.json").read_text()),
                }
            )
        )
    else:
        _tell(console, stages, repository, name, activate)


def _show_settings(preset: PresetOfBuild, as_json: bool) -> None:
    """Prints all settings that --set and preset files may change."""
    from builders.settings import settings_of

    settings = settings_of(preset)
    if as_json:
        print(json_text({"preset": preset.name, "settings": settings}, indent=1))
        return
    for name, value in settings.items():
        mark = "  (changed)" if name in preset.changes else ""
        print(f"{name} = {str(value).lower() if isinstance(value, bool) else value}{mark}")


def _tell(console: Console, stages: Stages, repository: Path, name: str, is_active: bool) -> None:
    """Prints what each stage took, the release's report, and what to do next."""
    from rich.markdown import Markdown

    from builders.publish.stage import was_there
    from builders.search.page import shown_lines, told_lines

    console.print(stages.table())
    console.print(Markdown((repository / name / "report.md").read_text()))
    report = json.loads((repository / name / "report.json").read_text())
    lines = [f"warning: {line}" for line in report.get("shortfalls", [])]
    search = report.get("search", {})
    for line in (*lines, *shown_lines(search), *told_lines(search)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    after = "serve it: peregrine serve" if is_active else f"activate it: peregrine release activate {name}"
    where = (
        "was there already, just as it was built: nothing to do"
        if was_there(stages.done[-1].folder)
        else "is there"
    )
    console.print(f"release {name} of {repository} {where}; {after} --repository {repository}")


def _facts(stages: Stages) -> dict[str, Any]:
    """Gives what each stage took, for --json."""
    return {
        "stages": [
            {
                "stage": s.name,
                "skipped": s.skipped,
                "duration_s": round(s.duration_s, 3),
                "peak_bytes": s.peak_bytes,
            }
            for s in stages.done
        ]
    }

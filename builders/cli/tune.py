"""Reads what `peregrine tune` was asked for, searches, and says what was gained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from builders.cli.build import Preset, Set
from ensemble.cli.options import REPOSITORY, CatalogueOption, RepositoryOption
from ensemble.json_text import json_text

Over = Annotated[
    list[str] | None,
    typer.Option(
        "--over",
        metavar="NAME",
        help="Search only this setting, or all whose names begin so, such as `ranker`; may be given often.",
    ),
]


def tune(
    shop: Annotated[Path, typer.Argument(help="Folder of the shop: shop.toml and its tables.")],
    preset: Preset = "base",
    changes: Set = None,
    over: Over = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the study, those of earlier runs too.")] = 20,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="No longer than this; what is at work then is given up.")
    ] = 60.0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trials at once, a process each.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; tune-NAME, by the shop's folder, if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the trainings, and of what is drawn.")] = 0,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Searches the settings of encoders and ranker for those whose lists are worth most to this shop.

    A trial trains with some settings and measures what `verify` measures first: the worth of the lists to
    held-out users, or NDCG@10 where a shop has no labels. It does so on the shop as it was before its test
    part began, so what is chosen here has not seen the rows by which `build` will judge it:

        peregrine tune shops/demo --preset tiny --trials 20 --minutes 60 --jobs 2
        peregrine build shops/demo --preset tune-demo/tuned.toml

    The first trial is the preset as it is. Ctrl-C, a kill or the end of the minutes leaves the study as it
    is, with the best so far in tuned.toml, or the preset while nothing is surely better; the same command
    goes on with it. What --set gives is not searched; `build --show-settings` lists all settings.
    """
    # read when torch is imported; spinning threads make a busy machine ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from builders.settings import named_preset
    from builders.tune.tune import TuneOptions, tune

    fixed = tuple(change.partition("=")[0].strip() for change in changes or [])
    options = TuneOptions(
        shop,
        out or Path(f"tune-{shop.resolve().name}"),
        named_preset(preset, changes),
        catalogue or repository,
        trials,
        minutes,
        jobs,
        seed,
        tuple(over or ()),
        fixed,
    )
    report = tune(options, Console(stderr=True))
    if as_json:
        print(json_text(report))
    _tell(shop, report)
    if report["stopped"] == "interrupt":
        raise typer.Exit(130)
    if "best" not in report:
        raise typer.Exit(2)


def _tell(shop: Path, report: dict[str, Any]) -> None:
    """Says what was gained and what to do next, on stderr."""
    from builders.tune.tune import gain_line

    goes_on = "the same command goes on"
    if "best" not in report:
        typer.echo(f"error: no trial came to its end; {goes_on}; give it more --minutes", err=True)
        return
    typer.echo(gain_line(report), err=True)
    for name, value in report["best"]["settings"].items():
        typer.echo(f"  {name} = {value}", err=True)
    if report["stopped"] != "trials":
        typer.echo(f"stopped by {report['stopped']}: {goes_on}", err=True)
    typer.echo(
        f"{report['preset']} and {report['plot']} are written; the test part judges them: "
        f"peregrine build {shop} --preset {report['preset']}",
        err=True,
    )

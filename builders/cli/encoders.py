"""Runs `peregrine encoders tune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble.json_text import json_text

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""The encoders of a shop's titles and pictures, which shop.toml names.

\b
tune   goes on training them on the shop itself, so that a photo finds titles and a text finds pictures
""",
)


@app.callback()
def _subcommands() -> None:
    """Keeps `tune` a subcommand, though it is the only one."""


@app.command()
def tune(
    shop: Annotated[
        Path, typer.Argument(metavar="SHOP", help="Folder of the shop: shop.toml and its tables.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make, with text and image in it.")],
    minutes: Annotated[
        float, typer.Option(min=0.01, help="No longer than this, but for reading the shop and writing.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="The same seed and as many steps give the same encoders.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fine-tunes the shop's encoders of texts and images on its own titles, pictures and clicks.

    \b
    peregrine encoders tune shops/mine --out encoders --minutes 20
    shop.toml, text feature:    encoder = "/path/to/encoders/text"
    shop.toml, image feature:   encoder = "/path/to/encoders/image"

    It learns to put an item's title beside its picture, and beside what users clicked with it within half an
    hour (training events alone), in a space of 128 components that both encoders then share. A tenth of the
    items judges; the state that is best for them stays. Ctrl-C or a kill leaves nothing behind.
    """
    # read when torch is imported; spinning threads make a busy machine ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from builders.content.tuning.tune import TuneOptions, tune_shop
    from ensemble.progress import bar, say

    with bar("tune") as update:
        options = TuneOptions(shop, out, minutes, seed)
        report = tune_shop(options, say, lambda share, text: update(text, share))
    if as_json:
        print(json_text(report))
    _tell(report)


def _tell(report: dict[str, Any]) -> None:
    """Writes the table of what was gained, and what to do next, to stderr."""
    from rich.console import Console
    from rich.table import Table

    names = list(next(iter(report["figures"].values())))
    table = Table(title=f"{report['held_out']:,} held-out items", title_justify="left")
    for name in ("", *(f"R@10, {name}" if "->" in name else f"cosine, {name}" for name in names)):
        table.add_column(name, justify="left" if not name else "right")
    for way, figures in report["figures"].items():
        table.add_row(way, *(f"{figures[name]:.3f}" for name in names))
    Console(stderr=True).print(table)
    if not report["gained"]:
        typer.echo(
            "tuning gained nothing: what is written are the encoders as they were, with heads", err=True
        )
    for feature, folder in report["features"].items():
        typer.echo(f'in shop.toml, feature {feature}: encoder = "{folder}"', err=True)

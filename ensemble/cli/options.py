"""Holds the options that many subcommands share. Importing this loads typer and nothing heavy.

@app.command()
def show(repository: RepositoryOption = REPOSITORY, release: ReleaseOption = None) -> None:
    name = active_or_named(repository, release)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REPOSITORY = Path("model_repository")  # the default of every --repository

RepositoryOption = Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")]
CatalogueOption = Annotated[
    Path | None,
    typer.Option(
        "--catalogue",
        help="The folder of route and catalogue log, which several servers may share; the repository if not "
        "given.",
        envvar="PEREGRINE_CATALOGUE",
    ),
]
ReleaseOption = Annotated[
    str | None, typer.Option("--release", help="The release; the active one if not given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RedisOption = Annotated[
    str,
    typer.Option(
        "--redis", help="redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.", envvar="PEREGRINE_REDIS"
    ),
]


def active_or_named(repository: Path, name: str | None = None, home: Path | None = None) -> str:
    """Gives `name`, or the active release's name for None; ReleaseError with the cure if none is active."""
    from ensemble.release.repository import require_active

    return name or require_active(repository, home)

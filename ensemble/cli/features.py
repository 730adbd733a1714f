"""Runs `peregrine features load | bench`: loads feature rows into Redis, and times each tier."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.cli.options import (
    REPOSITORY,
    JsonOption,
    RedisOption,
    ReleaseOption,
    RepositoryOption,
    active_or_named,
)
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from ensemble.release.release import Release

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Feature rows in Redis: load, measure.",
)


@app.command()
def load(
    redis: RedisOption,
    repository: RepositoryOption = REPOSITORY,
    release: ReleaseOption = None,
    ttl_days: Annotated[
        float, typer.Option(help="How long a row lives that nobody updates; load again before.")
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Loads a release's rows of users and items; servers read them at once, and earlier rows expire."""
    from ensemble.progress import bar
    from ensemble.tiers.load import load_release
    from ensemble.tiers.settings import TierSettings, hidden, url_from_option

    url = TierSettings(url_from_option(redis)).url
    opened = _open(repository, release)
    with bar(f"loading {opened.name}") as progress:
        summary = load_release(opened, url, progress, ttl_days=ttl_days)
    if as_json:
        print(json_text(dataclasses.asdict(summary), indent=1))
        return
    rate = (summary.users + summary.items) / max(summary.seconds, 1e-9)
    print(
        f"release {summary.release} of {summary.shop} is in Redis at {hidden(url)}, version {summary.version}"
    )
    print(
        f"  {summary.users:,} users, {summary.items:,} items in {summary.seconds:.1f} s, {rate:,.0f} rows/s"
    )
    if summary.previous:
        print(f"  version {summary.previous} is left; its {summary.expiring:,} keys expire")


@app.command()
def bench(
    repository: RepositoryOption = REPOSITORY,
    release: ReleaseOption = None,
    redis: Annotated[
        str | None,
        typer.Option("--redis", help="Redis with the release's rows; default: starts redis-server."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each line of the table.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """Measures CPU and wall time of reading a user and a list of candidates from each tier, and rows per
    second."""
    from ensemble.tiers.bench import measure, print_table
    from ensemble.tiers.settings import url_from_option

    figures = measure(_open(repository, release), url_from_option(redis) if redis else None, seconds)
    print_table(figures)
    if out:
        out.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")


def _open(repository: Path, name: str | None) -> Release:
    """Opens the release that is named, or the active one."""
    from ensemble.release.release import open_release

    return open_release(repository, active_or_named(repository, name))

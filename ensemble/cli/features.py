"""`peregrine features load | bench`: feature rows into Redis, and how fast each tier gives them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ensemble.release.release import Release

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Feature rows in Redis: load, measure.",
)

Repository = Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")]
ReleaseName = Annotated[str | None, typer.Option("--release", help="The release; default: the active one.")]
Redis = Annotated[
    str,
    typer.Option(
        "--redis", help="redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.", envvar="PEREGRINE_REDIS"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = Path("model_repository")


@app.command()
def load(
    redis: Redis,
    repository: Repository = DEFAULT,
    release: ReleaseName = None,
    ttl_days: Annotated[
        float, typer.Option(help="How long a row lives that nobody updates; load again before.")
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Loads a release's rows of users and items; servers turn to them at once, the rows loaded before
    expire."""
    from ensemble.progress import bar
    from ensemble.tiers.load import load_release
    from ensemble.tiers.settings import TierSettings, hidden, url_from_option

    url = TierSettings(url_from_option(redis)).url
    found = _open(repository, release)
    with bar(f"loading {found.name}") as progress:
        done = load_release(found, url, progress, ttl_days=ttl_days)
    if as_json:
        print(json.dumps(dataclasses.asdict(done), indent=1))
        return
    rate = (done.users + done.items) / max(done.seconds, 1e-9)
    print(f"release {done.release} of {done.shop} is in Redis at {hidden(url)}, version {done.version}")
    print(f"  {done.users:,} users, {done.items:,} items in {done.seconds:.1f} s, {rate:,.0f} rows/s")
    if done.previous:
        print(f"  version {done.previous} is left; its {done.expiring:,} keys expire")


@app.command()
def bench(
    repository: Repository = DEFAULT,
    release: ReleaseName = None,
    redis: Annotated[
        str | None,
        typer.Option("--redis", help="Redis with the release's rows; default: starts redis-server."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each line of the table.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """CPU and wall time of reading 1 user + its history and a list of candidates: snapshot, memory, Redis;
    rows per second."""
    from ensemble.tiers.bench import measure, print_table
    from ensemble.tiers.settings import url_from_option

    figures = measure(_open(repository, release), url_from_option(redis) if redis else None, seconds)
    print_table(figures)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _open(repository: Path, name: str | None) -> Release:
    from ensemble.errors import ReleaseError
    from ensemble.release.release import active_release, open_release

    name = name or active_release(repository)
    if name is None:
        raise ReleaseError(
            f"no release is active in {repository}; name one with --release, or build one: peregrine build "
            "SHOP --activate"
        )
    return open_release(repository, name)

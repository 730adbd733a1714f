"""`peregrine features load | bench`: feature rows into Redis, and how fast each tier gives them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Feature rows in Redis: load, measure.")

Repository = Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")]
ReleaseName = Annotated[str | None, typer.Option("--release", help="The release; default: the active one.")]
Redis = Annotated[str, typer.Option("--redis", help="redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.", envvar="PEREGRINE_REDIS")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = Path("model_repository")


@app.command()
def load(
    redis: Redis,
    repository: Repository = DEFAULT,
    release: ReleaseName = None,
    ttl_days: Annotated[float, typer.Option(help="How long a row lives that nobody updates; load again before.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Loads a release's rows of users and items; servers turn to them at once, the rows loaded before expire."""
    from ensemble.tiers.load import load_release
    from ensemble.tiers.settings import TierSettings, hidden, url_from_option

    url = TierSettings(url_from_option(redis)).url
    found = _open(repository, release)
    with _bar(f"loading {found.name}") as progress:
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
    redis: Annotated[str | None, typer.Option("--redis", help="Redis with the release's rows; default: starts redis-server.")] = None,
    seconds: Annotated[float, typer.Option(help="For each line of the table.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """CPU and wall time of reading 1 user + its history and a list of candidates: snapshot, memory, Redis; rows per second."""
    from ensemble.tiers.bench import measure, print_table
    from ensemble.tiers.settings import url_from_option

    figures = measure(_open(repository, release), url_from_option(redis) if redis else None, seconds)
    print_table(figures)
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _open(repository: Path, name: str | None):  # type: ignore[no-untyped-def]
    from ensemble.errors import ReleaseError
    from ensemble.release import active_release, open_release

    name = name or active_release(repository)
    if name is None:
        raise ReleaseError(f"no release is active in {repository}; name one with --release, or build one: peregrine build SHOP --activate")
    return open_release(repository, name)


def _bar(text: str):  # type: ignore[no-untyped-def]
    """A progress bar on stderr for whoever watches; gives update(text, share)."""
    import contextlib
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    @contextlib.contextmanager
    def shown() -> Iterator[Callable[[str, float], None]]:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(text, total=1.0)
            yield lambda step, share: progress.update(task, description=f"{text}: {step}", completed=share)

    return shown()

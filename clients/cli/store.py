"""Runs `peregrine push` and `peregrine pull`: releases, the route and changes to items by way of a store."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption, JsonOption, RepositoryOption
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from clients.operations.store import Store

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME]... STORE",
        help="Releases, and the store: s3://bucket/shop, file:///srv/store, or a folder. Without a release: "
        "those of the route, the route itself, and the log of items.",
    ),
]
Follow = Annotated[bool, typer.Option("--follow", help="Go on for ever, and say what has changed.")]
Every = Annotated[float, typer.Option("--every", min=0.1, help="With --follow: seconds between two looks.")]
Offline = Annotated[
    bool,
    typer.Option(
        "--serve-what-is-here",
        help="End well, and say so, where the store cannot be reached and a release is here to be served.",
    ),
]


def push(
    words: Words,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    follow: Follow = False,
    every: Every = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Pushes releases into a store, each once: peregrine push r7 s3://bucket/shop

    Credentials come from the environment, or from the files that the store's own tools read.
    """
    from clients.operations import push as pushing

    store, names = _store(words)

    def once() -> str:
        """Pushes once; gives what to print, nothing where nothing has changed."""
        done = pushing.push(repository, store, names, catalogue)
        if as_json:
            return json_text(dataclasses.asdict(done))
        what = ", ".join(done.releases)
        return f"{store.url} has {what}: {done.blobs} files sent, {done.sent_bytes / 1e6:.1f} MB" + (
            f"; route {done.route}, changes of items up to {done.sequence}" if not names else ""
        )

    _run(once, follow, every)


def pull(
    words: Words,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    follow: Follow = False,
    every: Every = 2.0,
    serve_what_is_here: Offline = False,
    as_json: JsonOption = False,
) -> None:
    """Pulls from a store what is missing here: peregrine pull s3://bucket/shop

    A release has its name when all its files are verified; a pull that was killed goes on where it stopped. A
    server at work follows the route that came, and recommends the items that came.
    """
    from clients.operations import pull as pulling
    from clients.operations.store import StoreError

    try:
        store, names = _store(words)

        def once() -> str:
            """Pulls once; gives what to print, nothing where nothing has changed."""
            done = pulling.pull(repository, store, names, catalogue)
            if as_json:
                return json_text(dataclasses.asdict(done))
            parts = [f"release {name}" for name in done.releases]
            parts += [f"route {done.route}"] if done.route else []
            parts += [f"changes of items up to {done.sequence}"] if done.sequence else []
            here = ", ".join(parts) or "nothing new"
            return (
                f"{here} from {store.url}, {done.fetched_bytes / 1e6:.1f} MB" if parts or not follow else ""
            )

        _run(once, follow, every)
    except StoreError as error:
        here = pulling.what_is_here(repository, catalogue)
        if not (serve_what_is_here and here):
            raise
        print(f"WARNING: {error}; release {here}, which is here, is served", file=sys.stderr)


def _store(words: list[str]) -> tuple[Store, list[str]]:
    """Opens the store that the last word names; gives it and the releases before it."""
    from clients.operations.store import Store

    return Store(words[-1]), words[:-1]


def _run(once: Callable[[], str], follow: bool, every_s: float) -> None:
    """Runs `once`, or for ever: then what is in the way is a warning, said when it begins and ends."""
    from ensemble.errors import PeregrineError

    problem, last = "", ""
    while True:
        try:
            said = once()
            if problem:
                print("the store is reached again", file=sys.stderr, flush=True)
            problem = ""
            if said and said != last:
                print(said, flush=True)
            last = said
        except PeregrineError as error:
            if not follow:
                raise
            if str(error) != problem:
                problem = str(error)
                print(
                    f"WARNING: {problem}; what is here goes on",
                    file=sys.stderr,
                    flush=True,
                )
        if not follow:
            return
        time.sleep(every_s)

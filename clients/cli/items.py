"""Runs `peregrine items add | update | upsert | delete | status | merge | serve`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.json_text import json_text
from ensemble.cli.options import REPOSITORY, JsonOption, RepositoryOption

if TYPE_CHECKING:
    from clients.items import Changed, ItemClient

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Add, change and remove items while they are served.",
)

Item = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="One item's id; its features as --set name=value.")
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help='JSON lines, one item each: {"item_id": …, feature: value, …}; - is stdin.'
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="name=value, the value JSON or text.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait until every instance has the change.")]
_AT_ONCE = 1000  # changes that are sent together


@app.command()
def add(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    repository: RepositoryOption = REPOSITORY,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Adds new items: peregrine items add lipstick-9 --set brand=Rouge --set price=12.5"""
    _change("add", item, file, set_, repository, wait_s, as_json)


@app.command()
def update(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    repository: RepositoryOption = REPOSITORY,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Gives new values to items that are there; what is not named stays."""
    _change("update", item, file, set_, repository, wait_s, as_json)


@app.command()
def upsert(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    repository: RepositoryOption = REPOSITORY,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Adds items that are not there, updates those that are."""
    _change("upsert", item, file, set_, repository, wait_s, as_json)


@app.command()
def delete(
    item: Item = None,
    file: File = None,
    repository: RepositoryOption = REPOSITORY,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Removes items: from now on they are not recommended."""
    _change("delete", item, file, None, repository, wait_s, as_json)


@app.command()
def status(repository: RepositoryOption = REPOSITORY, as_json: JsonOption = False) -> None:
    """Says how far the writer and every instance are."""
    from clients.items import ItemClient

    with ItemClient(repository, 0.0) as client:
        _print(client.status(), as_json)


@app.command()
def merge(repository: RepositoryOption = REPOSITORY, as_json: JsonOption = False) -> None:
    """Begins merging all changes into a new main index."""
    from clients.items import ItemClient

    with ItemClient(repository, 0.0) as client:
        _print(client.merge(), as_json)


@app.command()
def serve(repository: RepositoryOption = REPOSITORY) -> None:
    """Runs the writer alone, where Triton runs without `peregrine serve`."""
    from ensemble.live.service import serve_until_ended

    serve_until_ended(repository.resolve(), lambda line: print(line, file=sys.stderr, flush=True))


def _change(
    kind: str,
    item: str | None,
    file: Path | None,
    pairs: list[str] | None,
    repository: Path,
    wait_s: float,
    as_json: bool,
) -> None:
    """Makes one kind of change to one item, or to those of a file, and prints what became of it."""
    from clients.errors import InvalidArgument
    from clients.items import ItemClient, read_changes

    if (item is None) == (file is None):
        raise InvalidArgument("give one item's id, or --file with JSON lines")
    if file is None:
        changes = [{"op": kind, "item": {**dict(_pair(pair) for pair in pairs or []), "item_id": item}}]
    else:
        changes = read_changes(_lines(file), kind, str(file))
    with ItemClient(repository, wait_s) as client:
        done = _apply(client, changes)
    _print(done, as_json, len(changes))


def _apply(client: ItemClient, changes: list[dict[str, Any]]) -> Changed:
    """Sends changes in parts. Each part is made whole or not at all, and an error says how many changes came
    before it."""
    from ensemble.errors import PeregrineError
    from ensemble.progress import bar

    with bar("items") as update:
        for start in range(0, max(1, len(changes)), _AT_ONCE):
            update(f"{start:,} of {len(changes):,}", start / max(1, len(changes)))
            try:
                done = client.apply(changes[start : start + _AT_ONCE])
            except PeregrineError as error:
                if start:
                    error.args = (
                        f"{error} (the first {start} changes were made before it: send those after them "
                        "again)",
                    )
                raise
    return done


def _lines(file: Path) -> list[str]:
    """Reads the lines of a file, or of standard input."""
    from clients.errors import InvalidArgument

    if str(file) == "-":
        return sys.stdin.readlines()
    try:
        # splitlines would also cut at U+2028, which JSON may hold
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--file {file}: {error}") from None


def _pair(text: str) -> tuple[str, Any]:
    """Reads name=value; the value is JSON, or text where it is none."""
    from clients.errors import InvalidArgument

    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidArgument(f"--set: expected name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print(changed: Changed, as_json: bool, count: int | None = None) -> None:
    """Prints what became of `count` changes, or how far the writer is."""
    if as_json:
        print(json_text(dataclasses.asdict(changed)))
        return
    what = f"{count} changes, " if count is not None else ""
    where = (
        f"in all {len(changed.instances)} instances"
        if changed.done
        else "durable, but not yet in all instances"
    )
    print(
        f"{what}release {changed.release}+{changed.sequence}, {where}; {changed.items} items, "
        f"{changed.unmerged} changes beside the main index"
    )

"""Runs `peregrine items add | update | upsert | delete | list | show | status | compact | merge | serve`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.cli.options import (
    REPOSITORY,
    CatalogueOption,
    JsonOption,
    ReleaseOption,
    RepositoryOption,
    active_or_named,
)
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from clients.items import Changed, ItemClient
    from ensemble.live.shown import ShownItems

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
Title = Annotated[str | None, typer.Option(help="The item's title.")]
Image = Annotated[
    Path | None, typer.Option(help="A picture, JPEG, PNG or WebP, for shops whose pictures are encoded.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait until every instance has the change.")]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PATIENCE_S = 0.5, 15.0, 600.0  # while a writer takes no more changes


@app.command()
def add(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    title: Title = None,
    image: Image = None,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Adds new items: peregrine items add lip-9 --title "matte lipstick" --image 9.jpg --set price=12.5"""
    said = _said(set_, title, image)
    _change("add", item, file, said, catalogue or repository, wait_s, as_json)


@app.command()
def update(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    title: Title = None,
    image: Image = None,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Gives new values to items that are there; what is not named stays."""
    said = _said(set_, title, image)
    _change("update", item, file, said, catalogue or repository, wait_s, as_json)


@app.command()
def upsert(
    item: Item = None,
    file: File = None,
    set_: Set = None,
    title: Title = None,
    image: Image = None,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Adds items that are not there, updates those that are."""
    said = _said(set_, title, image)
    _change("upsert", item, file, said, catalogue or repository, wait_s, as_json)


@app.command()
def delete(
    item: Item = None,
    file: File = None,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    wait_s: Wait = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Removes items: from now on they are not recommended."""
    _change("delete", item, file, {}, catalogue or repository, wait_s, as_json)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Items a page.")] = 20,
    after: Annotated[str, typer.Option(help="Begin behind this id: the last one of the page before.")] = "",
    changed: Annotated[
        bool, typer.Option("--changed", help="Only items that were changed, deleted ones too.")
    ] = False,
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    release: ReleaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lists items in order of their ids: where they are from, and the number of their last change."""
    shown = _shown(repository, catalogue, release)
    page = (shown[item_id] for item_id in shown.ids(after, changed=changed))
    items = list(itertools.islice((one for one in page if one and (one.is_here or changed)), limit))
    if as_json:
        print(json_text([dataclasses.asdict(one) for one in items], indent=1))
        return
    from rich.console import Console

    from clients.cli.tables import folded_table

    table = folded_table("item", "from", "last change", "", "title")
    for one in items:
        sequence, gone = str(one.sequence or ""), "" if one.is_here else "deleted"
        table.add_row(one.item_id, one.source, sequence, gone, one.title)
    Console().print(table if items else "no such items")
    if len(items) == limit:
        print(f"the next page: --after {shlex.quote(items[-1].item_id)}")


@app.command()
def show(
    item: Annotated[str, typer.Argument(metavar="ID", help="The item's id.")],
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    release: ReleaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows an item as it was written, and which values are from the shop's files and which from the log."""
    from clients.errors import InvalidArgument

    one = _shown(repository, catalogue, release)[item]
    if one is None:
        raise InvalidArgument(
            f"item {item!r} is in no file that the release was built from, and was never changed; "
            "`peregrine items list` shows what there is"
        )
    if as_json:
        print(json_text(dataclasses.asdict(one), indent=1))
        return
    from rich.console import Console

    from clients.cli.tables import folded_table

    how = "can be recommended" if one.is_here else "is deleted"
    when = f", last change {one.sequence}" if one.sequence else ", never changed"
    print(f"item {one.item_id} {how}; from {one.source}{when}{f'; {one.title}' if one.title else ''}")
    table = folded_table("column", "value", "from")
    for column, value in one.values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(column, text, "log" if column in one.from_log else "files")
    if one.values:
        Console().print(table)


@app.command()
def status(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Says how far the writer, the loaded releases and every instance are, and how long the log is."""
    from clients.items import ItemClient

    with ItemClient(catalogue or repository, 0.0) as client:
        now = client.status()
    _print(now, as_json)
    if not as_json:
        for name, sequence in now.releases.items():
            print(f"  release {name} has all changes up to {sequence}")
        print(
            f"  the log has {now.log_lines} lines of {now.log_items} items, {now.log_bytes / 1e6:.1f} MB"
            + ("; `peregrine items compact` leaves one an item" if now.log_lines > now.log_items else "")
        )


@app.command()
def compact(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drops from the log all lines but each item's last; no change is lost, and releases notice nothing."""
    from clients.errors import Unavailable
    from clients.items import ItemClient
    from ensemble.live.catalogue_log import CatalogueLog

    home = catalogue or repository
    try:
        with ItemClient(home, 0.0) as client:
            before, after = client.status(), client.compact()
        dropped, lines, size = before.log_lines - after.log_lines, after.log_lines, after.log_bytes
    except Unavailable:  # nobody writes: we may
        if not (home / ".live" / "catalogue" / "log").exists():
            raise
        log = CatalogueLog(home, lambda line: print(line, file=sys.stderr))
        dropped, lines, size = log.compact(), log.num_lines, log.num_bytes
        log.close()
    if as_json:
        print(json_text({"dropped": dropped, "lines": lines, "bytes": size}))
    else:
        print(f"{dropped} lines dropped; the log has {lines}, {size / 1e6:.1f} MB")


@app.command()
def merge(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Begins merging all changes into a new main index."""
    from clients.items import ItemClient

    with ItemClient(catalogue or repository, 0.0) as client:
        _print(client.merge(), as_json)


@app.command()
def serve(repository: RepositoryOption = REPOSITORY, catalogue: CatalogueOption = None) -> None:
    """Runs the writer alone, where Triton runs without `peregrine serve`."""
    from ensemble.live.service import serve_until_ended
    from ensemble.progress import say

    home = (catalogue or repository).resolve()
    serve_until_ended(repository.resolve(), say, home=home)


def _shown(repository: Path, home: Path | None, release: str | None) -> ShownItems:
    """Opens the items of a release, the active one where none is named, as people wrote them."""
    from ensemble.live.shown import ShownItems
    from ensemble.release.release import open_release

    return ShownItems(open_release(repository, active_or_named(repository, release, home), home))


def _change(
    kind: str,
    item: str | None,
    file: Path | None,
    said: dict[str, Any],
    home: Path,
    wait_s: float,
    as_json: bool,
) -> None:
    """Makes one kind of change to one item, or to those of a file, and prints what became of it."""
    from clients.errors import InvalidArgument
    from clients.items import ItemClient, read_changes

    if (item is None) == (file is None):
        raise InvalidArgument("give one item's id, or --file with JSON lines")
    if file is not None and said:
        raise InvalidArgument("--set, --title and --image are of one item; in --file they stand in its lines")
    if file is None:
        changes = [{"op": kind, "item": {**said, "item_id": item}}]
    else:
        changes = read_changes(_lines(file), kind, str(file))
    with ItemClient(home, wait_s) as client:
        done = _apply(client, changes)
    _print(done, as_json, len(changes))
    if not as_json:
        _name_unknown(done)


def _said(pairs: list[str] | None, title: str | None, image: Path | None) -> dict[str, Any]:
    """Gives what the options say of an item."""
    said = dict(_pair(pair) for pair in pairs or [])
    return said | {name: value for name, value in (("title", title), ("image", image)) if value is not None}


def _name_unknown(done: Changed) -> None:
    """Says which of the values that came are in no vocabulary of the release."""
    for feature, values in done.unknown_values.items():
        names = ", ".join(map(repr, values))
        print(
            f"release {done.release} does not know {feature} {names}: filters find it, models take it as "
            "unknown until the next build",
            file=sys.stderr,
        )


def _apply(client: ItemClient, changes: list[dict[str, Any]]) -> Changed:
    """Sends changes in parts. Each part is made whole or not at all, and an error says how many changes came
    before it."""
    from clients.items import parts_of
    from ensemble.errors import PeregrineError
    from ensemble.progress import bar

    unknown: dict[str, list[str]] = {}
    with bar("items") as update:
        for start, end in parts_of(changes):
            update(f"{start:,} of {len(changes):,}", start / max(1, len(changes)))
            try:
                done = _patiently(client, changes[start:end])
            except PeregrineError as error:
                if start:
                    error.args = (
                        f"{error} (the first {start} changes were made before it: send those after them "
                        "again)",
                    )
                raise
            for feature, values in done.unknown_values.items():
                unknown[feature] = list(dict.fromkeys([*unknown.get(feature, []), *values]))
    return dataclasses.replace(done, unknown_values=unknown)


def _patiently(client: ItemClient, changes: list[dict[str, Any]]) -> Changed:
    """Sends changes, again and again while too many others wait to be merged, ever more seldom."""
    from clients.errors import Overloaded

    pause_s, until_s = _FIRST_PAUSE_S, time.monotonic() + _PATIENCE_S
    while True:
        try:
            return client.apply(changes)
        except Overloaded:
            if time.monotonic() + pause_s > until_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


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

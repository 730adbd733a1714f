"""`peregrine recommend USER…`: a ranked list on the terminal, with what the release knows about its items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from clients.results import Recommendations
    from ensemble.options import RequestOptions
    from ensemble.release.release import Release

DEFAULT_REPOSITORY = Path("model_repository")
DEFAULT_URL = "127.0.0.1:8001"
_RECENT = 5
_CONNECT_S = 2.0


def recommend(
    users: Annotated[list[str], typer.Argument(metavar="USER…", help="User ids.")],
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Items wanted.")] = None,
    session: Annotated[
        str | None, typer.Option(help="Items looked at just now: ID,ID,… newest last.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Items never to be returned: ID,ID,…")] = None,
    exclude_seen: Annotated[
        bool | None, typer.Option("--exclude-seen/--include-seen", help="Leave out what the user has had.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="FEATURE=VALUE,VALUE,… : only items with one of these values.")
    ] = None,
    deny: Annotated[
        list[str] | None, typer.Option(help="FEATURE=VALUE,VALUE,… : no item with one of these values.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="TASK=NUMBER: the task's weight in the score.")
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(help="FEATURE=COUNT: items of one value that a list may hold.")
    ] = None,
    diversity: Annotated[
        float | None, typer.Option(help="0..1: how much unlikeness counts against score.")
    ] = None,
    budget_ms: Annotated[float | None, typer.Option(help="How long to wait, in milliseconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"host:port of the server; default: the one that serves the repository, else {DEFAULT_URL}."
        ),
    ] = None,
    repository: Annotated[
        Path,
        typer.Option("--repository", "-r", help="Where titles and recent items are read, if it is there."),
    ] = DEFAULT_REPOSITORY,
) -> None:
    """Prints ranked lists: titles, scores, probabilities, and the users' recent items."""
    from clients.client import Client

    options: RequestOptions = {
        "top_k": top_k,
        "session_items": _split(session),
        "exclude_items": _split(exclude),
        "exclude_seen": exclude_seen,
        "allow": _pairs("--allow", allow, _split),
        "deny": _pairs("--deny", deny, _split),
        "weights": _pairs("--weight", weight, float),
        "caps": _pairs("--cap", cap, int),
        "diversity": diversity,
    }
    found_url, headers = find_server(repository, url)
    with Client(found_url, headers=headers) as client:
        client.connect(_CONNECT_S)  # so that the latency shown is the call's alone
        results = client.recommend_many(users, budget_ms=budget_ms, **options)
    catalogue = Catalogue(repository, results[0].release)
    if as_json:
        typer.echo(
            json.dumps(
                [json_from_result(result, catalogue) for result in results], indent=1, ensure_ascii=False
            )
        )
    else:
        _print_tables(results, catalogue)


def find_server(repository: Path, url: str | None) -> tuple[str, dict[str, str]]:
    """(host:port, headers): of the server that is asked for, else of the one at work on the repository."""
    from ensemble.server.running import running_server

    server = running_server(repository) if repository.is_dir() else None
    if server is None or (url is not None and url != server.url):
        return url or DEFAULT_URL, {}
    return server.url, server.headers


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _pairs(option: str, texts: list[str] | None, read: Any) -> dict[str, Any] | None:
    """["name=value", …] -> {name: read(value)}."""
    pairs = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        try:
            if not (separator and name and value):
                raise ValueError
            pairs[name] = read(value)
        except ValueError:
            raise InvalidInput(f"{option}: expected NAME=VALUE with a fitting value, got {text!r}") from None
    return pairs or None


class Catalogue:
    """Titles and histories of a release on this machine; says nothing where there is none."""

    def __init__(self, repository: Path, name: str) -> None:
        self._release = self._open(repository, name)

    @staticmethod
    def _open(repository: Path, name: str) -> Release | None:
        from ensemble.errors import ReleaseError
        from ensemble.release.release import open_release

        try:
            return open_release(repository, name)
        except ReleaseError:
            return None  # the server may well be on another machine

    def titles(self, item_ids: list[str]) -> list[str]:
        """One title per item; empty where unknown."""
        import numpy as np

        if self._release is None or not item_ids:
            return [""] * len(item_ids)
        rows = self._release.item_ids.rows_from_ids(np.array([item.encode() for item in item_ids]))
        return [
            title.decode("utf-8", "replace") if row else ""
            for row, title in zip(rows, self._release.item_titles[rows].tolist(), strict=True)
        ]

    def recent(self, user_id: str, count: int = _RECENT) -> list[str]:
        """Ids of the user's last items, newest first."""
        import numpy as np

        if self._release is None:
            return []
        row = int(self._release.user_ids.rows_from_ids(np.array([user_id.encode()]))[0])
        seen = np.array(self._release.users["seen"][row]) if row else np.zeros(0, np.int64)
        return [
            item.decode()
            for item in self._release.item_ids.ids_from_rows(seen[seen > 0][::-1][:count]).tolist()
        ]


def json_from_result(result: Recommendations, catalogue: Catalogue) -> dict[str, Any]:
    """One user's list in plain types."""
    recent = catalogue.recent(result.user_id)
    return {
        "user_id": result.user_id,
        "release": result.release,
        "degraded": [flag.name for flag in type(result.degraded) if flag in result.degraded],
        "latency_ms": round(result.latency_ms, 3),
        "recent": [
            {"item_id": item, "title": title}
            for item, title in zip(recent, catalogue.titles(recent), strict=True)
        ],
        "items": [
            {
                "item_id": item.item_id,
                "title": title,
                "score": item.score,
                "probabilities": item.probabilities,
            }
            for item, title in zip(result.items, catalogue.titles(list(result.item_ids)), strict=True)
        ],
    }


def _print_tables(results: list[Recommendations], catalogue: Catalogue) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for result in results:
        plain = json_from_result(result, catalogue)
        note = f" · {', '.join(plain['degraded']).lower()}" if plain["degraded"] else ""
        console.print(
            Text(
                f"{result.user_id} · release {result.release} · {result.latency_ms:.1f} ms{note}",
                style="bold",
            )
        )
        for item in plain["recent"]:
            console.print(Text(f"  had  {item['item_id']}  {item['title']}", style="dim"))
        tasks = list(plain["items"][0]["probabilities"]) if plain["items"] else []
        table = Table("#", "item", "title", "score", *tasks)
        for place, item in enumerate(plain["items"], 1):
            values = [f"{value:.4f}" for value in (item["score"], *item["probabilities"].values())]
            table.add_row(str(place), Text(item["item_id"]), Text(item["title"]), *values)
        console.print(table)

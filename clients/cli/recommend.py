"""Runs `peregrine recommend USER…`: prints ranked lists, with what the release knows about their items."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY, JsonOption
from ensemble.contract import Degraded
from ensemble.errors import InvalidInput
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from clients.results import Recommendations
    from clients.tls import Tls
    from ensemble.options import RequestOptions
    from ensemble.release.release import Release

DEFAULT_URL = "127.0.0.1:8001"
_RECENT = 5  # items of a user's past that are shown
CONNECT_S = 2.0

Users = Annotated[list[str], typer.Argument(metavar="USER…", help="User ids.")]
TopK = Annotated[int | None, typer.Option("--top-k", "-k", help="Items wanted.")]
Session = Annotated[str | None, typer.Option(help="Items looked at just now: ID,ID,… newest last.")]
Exclude = Annotated[str | None, typer.Option(help="Items never to be returned: ID,ID,…")]
ExcludeSeen = Annotated[
    bool | None, typer.Option("--exclude-seen/--include-seen", help="Leave out what the user has had.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help='FEATURE=VALUE,"A, B",… : only items with one of these values.'),
]
Deny = Annotated[
    list[str] | None, typer.Option(help="FEATURE=VALUE,VALUE,… : no item with one of these values.")
]
Weight = Annotated[list[str] | None, typer.Option(help="TASK=NUMBER: the task's weight in the score.")]
Cap = Annotated[
    list[str] | None, typer.Option(help="FEATURE=COUNT: items of one value that a list may hold.")
]
Diversity = Annotated[float | None, typer.Option(help="0..1: how much unlikeness counts against score.")]
Context = Annotated[
    list[str] | None,
    typer.Option(help="FEATURE=VALUE: what the request says of its moment, such as device=phone."),
]
Like = Annotated[
    str | None, typer.Option(help="Items that the list shall be like: ID,ID,… (of a release with search).")
]
BudgetMs = Annotated[float | None, typer.Option(help="How long to wait, in milliseconds.")]
Url = Annotated[
    str | None,
    typer.Option(
        help=f"host:port of the server; default: the one that serves the repository, else {DEFAULT_URL}."
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca", help="By TLS: certificates of the authority that signs the server.", show_default=False
    ),
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", help="By TLS: this client's certificate.", show_default=False)
]
Key = Annotated[Path | None, typer.Option("--key", help="The certificate's key.", show_default=False)]
ServerName = Annotated[
    str | None,
    typer.Option(
        "--server-name", help="By TLS: the name in the server's certificate, if it is not the host's."
    ),
]
Repository = Annotated[
    Path,
    typer.Option("--repository", "-r", help="Where titles and recent items are read, if it is there."),
]


def recommend(
    users: Users,
    top_k: TopK = None,
    session: Session = None,
    exclude: Exclude = None,
    exclude_seen: ExcludeSeen = None,
    allow: Allow = None,
    deny: Deny = None,
    weight: Weight = None,
    cap: Cap = None,
    diversity: Diversity = None,
    context: Context = None,
    like: Like = None,
    budget_ms: BudgetMs = None,
    as_json: JsonOption = False,
    url: Url = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    repository: Repository = REPOSITORY,
) -> None:
    """Prints ranked lists: titles, scores, probabilities, and the users' recent items."""
    from clients.client import Client

    options = options_of(
        top_k=top_k,
        session=session,
        exclude=exclude,
        exclude_seen=exclude_seen,
        allow=allow,
        deny=deny,
        weight=weight,
        cap=cap,
        diversity=diversity,
        context=context,
    )
    server_url, headers = find_server(repository, url)
    tls = tls_of(ca, certificate, key, server_name)
    with Client(server_url, headers=headers, tls=tls) as client:
        client.connect(CONNECT_S)  # so that the latency shown is the call's alone
        if like is not None:
            near = {**options, "like": _split(like)}
            results = [client.search(user, budget_ms=budget_ms, **near) for user in users]  # type: ignore[arg-type]
        else:
            results = client.recommend_many(users, budget_ms=budget_ms, **options)
    show(results, options, repository, as_json=as_json)


def options_of(
    *,
    top_k: int | None = None,
    session: str | None = None,
    exclude: str | None = None,
    exclude_seen: bool | None = None,
    allow: list[str] | None = None,
    deny: list[str] | None = None,
    weight: list[str] | None = None,
    cap: list[str] | None = None,
    diversity: float | None = None,
    context: list[str] | None = None,
) -> RequestOptions:
    """Reads a command's options as a request's; InvalidInput names the one that is wrong."""
    return {
        "top_k": top_k,
        "session_items": _split(session),
        "exclude_items": _split(exclude),
        "exclude_seen": exclude_seen,
        "allow": _pairs("--allow", allow, _split),
        "deny": _pairs("--deny", deny, _split),
        "weights": _pairs("--weight", weight, float),
        "caps": _pairs("--cap", cap, int),
        "diversity": diversity,
        "context": _pairs("--context", context, str),
    }


def show(results: list[Recommendations], options: RequestOptions, repository: Path, *, as_json: bool) -> None:
    """Prints lists as tables, or as JSON; values of `options` that no item has are told."""
    catalogue = Catalogue(repository, results[0].release)
    if any(Degraded.UNKNOWN_VALUES in result.degraded for result in results):
        for line in catalogue.notes(options):
            typer.echo(f"note: {line}", err=True)
    if as_json:
        plain = [json_from_result(result, catalogue) for result in results]
        typer.echo(json_text(plain, indent=1, ensure_ascii=False))
    else:
        _print_tables(results, catalogue)


def find_server(repository: Path, url: str | None) -> tuple[str, dict[str, str]]:
    """Gives host:port and headers of the server that `url` names, else of the repository's own."""
    from ensemble.server.running import running_servers

    servers = running_servers(repository) if repository.is_dir() else []
    server = next((one for one in servers if url in (None, one.url)), None)
    return (url or DEFAULT_URL, {}) if server is None else (server.url, server.headers)


def tls_of(
    ca: Path | None, certificate: Path | None, key: Path | None, server_name: str | None
) -> Tls | None:
    """Reads a command's options as those of TLS; None where there are none."""
    from clients.tls import Tls

    given = (ca, certificate, key, server_name)
    return None if given == (None,) * 4 else Tls(*given)


def _split(text: str | None) -> list[str] | None:
    """Cuts 'a,b' into its parts; a part in double quotes may hold commas: 'a,"b, c"'."""
    if text is None:
        return None
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise InvalidInput(
            f'{text!r}: a double quote is not closed; write "a, b",c to quote commas, and "" for a quote'
        ) from None
    return [part.strip() for part in (rows[0] if rows else []) if part.strip()]


def _pairs(option: str, texts: list[str] | None, read: Any) -> dict[str, Any] | None:
    """Reads ["name=value", …] as {name: read(value)}; None where there is none."""
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
    """Reads titles and histories of a release on this machine; knows nothing where there is none."""

    def __init__(self, repository: Path, name: str) -> None:
        self.repository, self.name = repository, name
        self._release = self._open(repository, name)

    @property
    def is_there(self) -> bool:
        """Says whether this machine has the release."""
        return self._release is not None

    @staticmethod
    def _open(repository: Path, name: str) -> Release | None:
        from ensemble.errors import ReleaseError
        from ensemble.release.release import open_release

        try:
            return open_release(repository, name)
        except ReleaseError:
            return None  # the server may well be on another machine

    def titles(self, item_ids: list[str]) -> list[str]:
        """Gives one title per item; empty where unknown."""
        import numpy as np

        if self._release is None or not item_ids:
            return [""] * len(item_ids)
        rows = self._release.item_ids.rows_from_ids(np.array([item.encode() for item in item_ids]))
        return [
            title.decode("utf-8", "replace") if row else ""
            for row, title in zip(rows, self._release.item_titles[rows].tolist(), strict=True)
        ]

    def notes(self, options: RequestOptions) -> list[str]:
        """Says which values of a request's filters no item has; the server says that there are some."""
        wanted = (("--allow", options.get("allow")), ("--deny", options.get("deny")))
        lines = [line for option, values in wanted for line in self.strangers(option, values or {})]
        return lines or ["--allow, --deny: a value is none that an item has"]

    def strangers(self, option: str, wanted: Mapping[str, Any]) -> list[str]:
        """Says which values of category features no item of the release has, and what they may have meant."""
        known = {} if self._release is None else self._release.vocabularies.get("items", {})
        lines = []
        for feature, values in wanted.items():
            for value in values if feature in known else ():
                if value not in known[feature]:
                    lower = {one.lower(): one for one in known[feature]}
                    near = difflib.get_close_matches(value.lower(), lower, 1)
                    hint = f"; do you mean {lower[near[0]]!r}?" if near else ""
                    lines.append(f"{option} {feature}: no item of the release has {value!r}{hint}")
        return lines

    def recent(self, user_id: str, count: int = _RECENT) -> list[str]:
        """Gives the ids of the user's last items, newest first."""
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
    """Writes one user's list in JSON's types."""
    recent = catalogue.recent(result.user_id)
    return {
        "user_id": result.user_id,
        "release": result.release,
        "sequence": result.sequence,
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
                **({"finders": list(item.finders)} if item.finders else {}),
            }
            for item, title in zip(result.items, catalogue.titles(list(result.item_ids)), strict=True)
        ],
    }


def _number(value: float) -> str:
    """Writes a score or a probability with four decimals, a small one so that it is none of many zeros."""
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _print_tables(results: list[Recommendations], catalogue: Catalogue) -> None:
    """Prints for each user a line, the items had last, and the list as a table."""
    from rich.console import Console
    from rich.text import Text

    from clients.cli.tables import folded_table

    console = Console()
    for result in results:
        plain = json_from_result(result, catalogue)
        note = f" · {', '.join(plain['degraded']).lower()}" if plain["degraded"] else ""
        line = f"{result.user_id} · release {result.release} · {result.latency_ms:.1f} ms{note}"
        console.print(Text(line, style="bold"))
        for item in plain["recent"]:
            console.print(Text(f"  had  {item['item_id']}  {item['title']}", style="dim"))
        tasks = list(plain["items"][0]["probabilities"]) if plain["items"] else []
        found = ["found by"] if any("finders" in item for item in plain["items"]) else []
        table = folded_table("#", "item", "title", "score", *tasks, *found)
        for place, item in enumerate(plain["items"], 1):
            values = [_number(value) for value in (item["score"], *item["probabilities"].values())]
            values += [", ".join(item["finders"])] if found else []
            table.add_row(str(place), Text(item["item_id"]), Text(item["title"]), *values)
        console.print(table)
    if not catalogue.is_there:
        where = f"{catalogue.repository} has no release {catalogue.name}"
        console.print(Text(f"no titles: {where}; --repository names one that has it", style="dim"))

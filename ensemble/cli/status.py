"""Runs `peregrine status`: says on one screen how a repository is served, what is wrong and what to type."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption, JsonOption, RepositoryOption
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from ensemble.server.status import Status

Ready = Annotated[
    bool,
    typer.Option("--ready", help="Only say whether `recommend` is answered, by the exit code: for probes."),
]
State = Annotated[Path | None, typer.Option(help="Of the server with this state folder alone.")]
Metrics = Annotated[
    bool, typer.Option("--metrics", help="Print Prometheus' text, for a collector that reads files.")
]


def status(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    state: State = None,
    ready: Ready = False,
    metrics: Metrics = False,
    as_json: JsonOption = False,
) -> None:
    """Says how a repository is served, what is wrong and what to type.

    Exit codes: 0 all is well, 1 it answers but something is wrong, 2 it cannot be told, 3 nobody answers.
    """
    from ensemble.errors import InvalidInput
    from ensemble.server import status as looking

    if not repository.is_dir():
        raise InvalidInput(f"repository {repository} does not exist", "name it with --repository")
    if ready:
        why = looking.is_ready(repository, catalogue, state)
        print(f"not ready: {why}" if why else "ready", file=sys.stderr if why else sys.stdout)
        sys.exit(looking.DOWN if why else looking.WELL)
    found = looking.gather(repository, catalogue, state)
    if as_json:
        print(json_text(found.to_json(), indent=1))
    elif metrics:
        print("\n".join(_metrics(found)))
    else:
        _show(found)
    sys.exit(found.exit_code)


def _metrics(found: Status) -> list[str]:
    """Writes the numbers of all servers as Prometheus' text."""
    lines = [f"peregrine_ready {int(found.is_ready)}", f"peregrine_problems {len(found.problems)}"]
    for server in found.facts["servers"]:
        at = f'url="{server["url"]}"'
        lines.append(f"peregrine_restarts{{{at}}} {server['restarts'] or 0}")
        lines.append(f"peregrine_repairs{{{at}}} {server['repairs'] or 0}")
        for name, one in server["models"].items():
            label = f'{{{at},model="{name}"}}'
            lines.append(f"peregrine_processes_wanted{label} {one['wanted']}")
            lines.append(f"peregrine_processes_alive{label} {one['alive'] or 0}")
            if one["canary_ms"] is not None:
                lines.append(f"peregrine_canary_ms{label} {one['canary_ms']:.3f}")
    lines += [
        f'peregrine_disk_free_bytes{{path="{disk["path"]}"}} {disk["free_bytes"]}'
        for disk in found.facts["disks"]
    ]
    return lines


def _show(found: Status) -> None:
    """Prints it all for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, facts = Console(soft_wrap=True, highlight=False), found.facts
    words = {0: "[green]all is well[/]", 1: "[yellow]it answers, but[/]", 3: "[red]nobody answers[/]"}
    console.print(f"[bold]{escape(facts['repository'])}[/]  {words[found.exit_code]}  {facts['at']}")
    grid = Table.grid(padding=(0, 2))
    for name, text in _lines(facts):
        grid.add_row(f"[dim]{name}[/]", escape(text))
    console.print(grid)
    for server in facts["servers"]:
        if server["models"]:
            console.print(_models(server))
    for problem in found.problems:
        console.print(f"[red]wrong[/]  {escape(problem.what)}\n       [bold]->[/] {escape(problem.cure)}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Gives the lines of the screen, but for models and problems."""
    lines = [("route", _route(facts["route"]))]
    for change in facts["changes"][:1]:
        lines.append(
            (
                "last change",
                f"{change['at']} by {change['by']}: {_shares(change['from'])} -> {_shares(change['to'])}",
            )
        )
    for server in facts["servers"]:
        lines.append(
            (
                "server",
                f"{server['url']}  {server['phase']} since {server['since']}, {server['way']}, "
                f"{server['runtime']}; process {server['pid']}",
            )
        )
        restarts = f"{server['restarts']} restarts, {server['repairs']} repairs"
        lines.append(("", f"{restarts}; Redis: {server['redis']}"))
        lines.append(("last minute", _minute(server["last_minute"])))
    if facts["servers_of_others"]:
        lines.append(("others", f"{facts['servers_of_others']} servers of other users"))
    lines += [
        ("engine", f"{one['engine']} on {', '.join(one['runs_on']) or 'nothing'}, {one['plans']} plans")
        for one in facts["engines"]
    ]
    lines.append(("items", _items(facts["items"])))
    lines.append(
        ("disk", ", ".join(f"{d['free_bytes'] / 1e9:.1f} GB free in {d['path']}" for d in facts["disks"]))
    )
    return lines


def _models(server: dict[str, Any]) -> Any:
    """Makes the table of a server's models."""
    from rich.table import Table

    table = Table("model", "alive", "canary", "runs on", box=None, padding=(0, 2))
    for name, one in server["models"].items():
        took = "-" if one["canary_ms"] is None else f"{one['canary_ms']:.1f} ms"
        alive = f"{one['alive']} of {one['wanted']}" if one["wanted"] else "in Triton"
        table.add_row(name, alive, one["fault"] or took, one["runs_on"])
    return table


def _route(route: dict[str, Any] | None) -> str:
    """Writes the route."""
    if route is None:
        return "none"
    shares = ", ".join(f"{one['release']} {one['share']:.3g}" for one in route["shares"])
    return f"{shares} since {route['since'] or '?'} by {route['by'] or '?'} (change {route['sequence']})"


def _shares(shares: dict[str, float]) -> str:
    """Writes shares of releases."""
    return ", ".join(f"{name} {share:.3g}" for name, share in shares.items()) or "nothing"


def _minute(minute: dict[str, Any] | None) -> str:
    """Writes what happened in the last minute."""
    if not minute:
        return "not known (yet, or metrics are off)"
    lists = minute["lists"]
    flags = ", ".join(f"{name} {count / max(lists, 1):.1%}" for name, count in minute["flagged"].items())
    return f"{lists:.0f} lists; {flags or 'none degraded'}"


def _items(live: dict[str, Any]) -> str:
    """Writes how the items' log and writer are."""
    if not live["pid"]:
        return "no writer" + ("; there is a log of changes" if live["log"] else "")
    if not live["answers"]:
        return f"writer {live['pid']} does not answer"
    return f"writer {live['pid']}, change {live.get('sequence', 0)}, {live.get('unmerged', 0)} not merged"

"""Runs `peregrine evaluate`: asks releases about users at a time that their models have not seen."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.cli.options import REPOSITORY, JsonOption, RepositoryOption
from ensemble.errors import InvalidInput
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from builders.evaluate.evaluation import Answers

Releases = Annotated[list[str], typer.Argument(metavar="RELEASE...", help="One, or several seeds.")]
Users = Annotated[
    Path | None,
    typer.Option(help="File of the users to ask about, one id a line; all if not given."),
]
Until = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="What is known came before it: a date, a time (UTC), Unix seconds, or a position. If not "
        "given: the rows that the build held out.",
    ),
]
Event = Annotated[
    str | None,
    typer.Option(
        help="Ask for the next item that this befell, such as `buy`: one that was new, and was bought."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Write every user's places to this parquet file.")]


def evaluate(
    releases: Releases,
    repository: RepositoryOption = REPOSITORY,
    users: Users = None,
    until: Until = None,
    event: Event = None,
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """Asks what a release's verified model would have shown users, and where what they took stands in it.

    The rows are those that the build held out, or what users did at --until and later. What the model has
    learned from is refused: a release that was published after a refit is asked through its verified model,
    which `peregrine build` keeps in .build of the repository. Several releases, such as three seeds, give
    mean and standard error:

        peregrine build shops/mine --seed 1 --release s1
        peregrine evaluate s0 s1 s2 --out ranks.parquet
    """
    from builders.evaluate.evaluation import evaluate as ask
    from builders.evaluate.evaluation import means_of, write_ranks
    from ensemble.progress import bar

    when, ids = (
        None if until is None else time_from_text(until),
        None if users is None else _read_users(users),
    )
    with bar("evaluate") as update:
        answers = ask(
            repository,
            releases,
            until=when,
            user_ids=ids,
            event=event,
            progress=lambda share, text: update(text, share),
        )
    if out is not None:
        write_ranks(answers, out)
    means = means_of(answers)
    if as_json:
        print(json_text({"releases": [one.report for one in answers], "mean": means}))
    else:
        _show(answers, means, out)


def time_from_text(text: str) -> int:
    """Reads Unix seconds (or a position) or an ISO date or time, UTC where it names no zone."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            f"--until {text}: is no time", "2026-11-05, 2026-11-05T18:30:00, or Unix seconds"
        ) from None
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())


def _read_users(path: Path) -> list[bytes]:
    """Reads one id a line; empty lines are left out."""
    try:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InvalidInput(f"--users {path} cannot be read: {error.strerror}") from None
    if not any(lines):
        raise InvalidInput(f"--users {path} is empty", "one user's id a line")
    return [line for line in lines if line]


def _show(answers: list[Answers], means: dict[str, dict[str, float]], out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for one in answers:
        of, few = one.report, one.report["of_users"] > one.report["users"]
        who = f"{of['users']:,} users" + (f" (a sample of {of['of_users']:,})" if few else "")
        if of["unknown_users"]:
            who += f"; {of['unknown_users']:,} named ones are not the release's"
        console.print(
            f"{one.kept.name}: its verified model, trained up to {of['trained_up_to']}; {who}", markup=False
        )
        if of["note"]:
            console.print(f"note: {of['note']}", markup=False)
    table = Table(box=None, pad_edge=False)
    several = len(answers) > 1
    for column in ("figure", "mean" if several else "value", "standard error" if several else "95% interval"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, of in means.items():
        spread = f"{of['standard_error']:.4f}" if several else _interval(answers[0], name)
        table.add_row(name, f"{of['mean']:.4f}", spread)
    console.print(table)
    if out is not None:
        console.print(f"every user's places are in {out}", markup=False)


def _interval(answers: Answers, name: str) -> str:
    """Gives the interval of a list's figure; tasks' have one in the release's report."""
    figure, _, way = name.partition(" ")
    value = answers.report["ranking"].get(figure, {}).get("ways", {}).get(way)
    return "" if value is None else f"[{value['low']:.4f}, {value['high']:.4f}]"

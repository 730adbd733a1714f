"""`peregrine shop generate | import | init | check`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.errors import PeregrineError
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from rich.table import Table

    from builders.data.check import Report

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""A shop is a folder: shop.toml and the files it names: parquet, CSV, JSON lines, Arrow.

\b
The shortest shop.toml:
    name = "mine"
    [interactions]
    file = "interactions.csv"     # columns user_id, item_id, time (Unix seconds)

\b
Add what you have:
    split = "time"                # or "leave_one_out" (default); a top-level key, above the tables
    [items]
    file = "items.parquet"
    id = "item_id"
    title = "title"
    [[items.features]]            # [users] and [[users.features]] likewise
    name = "brand"                # the column; or: name = "words", column = "title"
    kind = "category"             # category | number | text | image | video | vector(<dim>)
                                  # text, image, video (a list of frames) of items:
                                  # encoder = "minilm" | "efficientnet-lite0" | FOLDER
    [[tasks]]                     # what the ranker learns; without one: will the user take it
    name = "ctr"
    kind = "binary"               # or "regression"
    label = {column = "clicked"}  # or {column = "rating", threshold = 4} or {event = "click"}
    [[tasks]]
    name = "cvr"
    label = {column = "bought"}
    given = "ctr"                 # defined only where ctr happened

\b
With one row per event, [interactions] gets event = "<column>" and, if showing is one, impression = "view".
label = {event = "buy", within = "7d"} counts what comes within a time of the showing; a label whose time is
not over when its part of the split ends is left out.
position = "<column>" is where an item stood in its list (1 = first), if that was logged;
propensity = "<column>" is the chance with which it was shown.
history = "ctr" | ["click", "buy"] | "all" (of ratings) make a history. All keys: builders/shop/shop_toml.py.
""",
)
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except PeregrineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 5_000,
    items: Annotated[int, typer.Option(help="Number of items.")] = 2_000,
    events: Annotated[int, typer.Option(help="Number of shown items, clicked or not.")] = 300_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same shop.")] = 0,
    images: Annotated[
        bool | None,
        typer.Option(
            "--images/--no-images", help="Render a small picture of each item; default: up to 2,000 items."
        ),
    ] = None,
    encoders: Annotated[
        bool | None,
        typer.Option(
            "--encoders/--no-encoders",
            help="Read titles and pictures with pretrained encoders; default: where they are installed, "
            "up to 2,000 items.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="All that decides stands in features: no effects of single users and items, no positions, "
            "no seasons, nothing new or gone.",
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Make a beauty shop whose truth is known: clicks, purchases and dwell are drawn from planted
    probabilities.

    \b
    peregrine shop generate shops/demo
    peregrine shop generate shops/large --items 1000000 --users 200000 --events 5000000
    """
    with _one_line_errors():
        from builders.content.sources import EFFICIENTNET, MINILM, is_installed
        from builders.shop.generate import MAX_DEFAULT_IMAGES, generate_shop
        from ensemble.progress import bar

        if encoders is None:
            encoders = items <= MAX_DEFAULT_IMAGES and is_installed(MINILM) and is_installed(EFFICIENTNET)
        with bar("generate") as update:
            generate_shop(
                out,
                users=users,
                items=items,
                events=events,
                seed=seed,
                images=images,
                encoders=encoders,
                plain=plain,
                force=force,
                progress=update,
            )
    typer.echo(
        f"{out}: {users} users, {items} items, {events} interactions. Next: peregrine shop check {out}"
    )


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The file or folder to read.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    form: Annotated[
        str, typer.Option("--format", help="sequences | recbole | movielens | retailrocket | amazon")
    ],
    name: Annotated[str | None, typer.Option(help="Which data set, where SRC holds several.")] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="ROLE=COLUMN", help="Which column is user, item, time, event or rating."
        ),
    ] = None,
    like_from: Annotated[
        float | None, typer.Option("--like-from", help="The rating from which an item counts as liked.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn known data formats into a shop, and say what each column was taken for.

    \b
    sequences     lines "user item item …", in order; NAME_items.tsv (item_id, title) and
                  NAME_item2attributes.json are read where they lie beside. One task, interact; the last item
                  of each user tests.
    recbole       atomic files: NAME.inter, and NAME.item, NAME.user where there are any; a split in files
                  (NAME.train.inter, NAME.valid.inter, NAME.test.inter) is the shop's
    movielens     the unpacked folder: ml-100k, ml-1m, ml-20m, ml-latest…
    retailrocket  the unpacked folder: events.csv, item_properties_part*.csv, category_tree.csv. Views are
                  what was shown, cart and buy the tasks.
    amazon        reviews as JSON lines (2014's or 2023's), and meta_NAME beside them
    A rating of 4 or more is a like, or --like-from. Any other folder: peregrine shop init.

    \b
    peregrine shop import --format sequences --name Beauty data/seq_s3rec shops/beauty
    peregrine shop import --format amazon --like-from 5 --map item=asin All_Beauty.jsonl shops/beauty
    """
    with _one_line_errors():
        from builders.shop.imported import Asked
        from builders.shop.importers import import_shop
        from ensemble.progress import bar

        asked = Asked(name, _told(roles), like_from)
        with bar("import") as update:
            update(form, 0.0)
            mapping = import_shop(form, source, out, asked=asked, force=force)
    for file, column, role in mapping:
        typer.echo(f"{file}: {column} = {role}")
    typer.echo(f"{out} is written. Next: peregrine shop check {out}")


def _told(roles: list[str] | None) -> dict[str, str]:
    """Reads what --map says: a column by role."""
    from ensemble.errors import InvalidInput

    told = {}
    for role in roles or []:
        name, sign, column = role.partition("=")
        if not sign or not column:
            raise InvalidInput(f"--map {role}: write ROLE=COLUMN, such as item=artist_id")
        told[name] = column
    return told


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder with the shop's files.")],
    roles: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="ROLE=COLUMN",
            help="Which column is user, item, time, event, rating, label or title; which file is "
            "interactions, items or users.",
        ),
    ] = None,
    like_from: Annotated[
        float | None, typer.Option("--like-from", help="The rating from which an item counts as liked.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write shop.toml anew.")] = False,
) -> None:
    """Look at any folder of tables and write a first shop.toml into it, for a person to correct.

    \b
    peregrine shop init retailrocket --map interactions=events.csv
    peregrine shop init amazon --like-from 4
    """
    with _one_line_errors():
        from builders.shop.first_toml import init_shop

        first = init_shop(folder, told=_told(roles), like_from=like_from, force=force)
    for file, column, role in first.mapping:
        typer.echo(f"{file}: {column} = {role}")
    typer.echo(f"{folder / 'shop.toml'} is written. Correct it, then: peregrine shop check {folder}")


@app.command()
def check(
    shop: Annotated[Path, typer.Argument(metavar="SHOP", help="The shop's folder.")],
    as_json: Annotated[
        bool,
        typer.Option("--json", help='Print {"shop", "sections", "warnings"}; "error" if it cannot be built.'),
    ] = False,
) -> None:
    """Say what is in a shop and what is wrong with it. Exit code 2 where a build would refuse it."""
    from builders.data.check import check_shop
    from ensemble.progress import bar

    try:
        with bar("check") as update:
            report = check_shop(shop, progress=lambda step: update(step, 0.0))
    except PeregrineError as error:
        if as_json:
            typer.echo(json_text({"shop": str(shop), "error": str(error)}))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json_text(report.as_json(), indent=1))
        return
    _print(report)


def _print(report: Report) -> None:
    """Prints what a shop has, what each column was taken for, and the warnings."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    name, sections, warnings = report.shop, report.sections, report.warnings
    table = Table(title=name, show_header=False, box=None, pad_edge=False)
    for title, section in sections.items():
        for at, (what, value) in enumerate(section.items()):
            shown = (
                ", ".join(f"{k} {v:,}" for k, v in value.items())
                if isinstance(value, dict)
                else f"{value:,}"
                if isinstance(value, (int, float))
                else str(value)
            )
            table.add_row(title if at == 0 else "", what, escape(shown), end_section=at == len(section) - 1)
    console = Console()
    console.print(table)
    console.print(_columns(report.columns))
    for column in report.columns:
        for note in column["notes"]:
            line = f"{column['file']}: {column['name']}: {note}"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    console.print(
        "[green]nothing wrong[/green]"
        if not warnings
        else f"{len(warnings)} warning{'s' * (len(warnings) > 1)}; a build works"
    )


def _columns(columns: list[dict[str, Any]]) -> Table:
    """Makes the table of what each column was taken for."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("column", "taken for", "from", "to", "missing", box=None, pad_edge=False)
    file = ""
    for column in columns:
        if column["file"] != file:
            file = column["file"]
            table.add_row(f"[bold]{escape(file)}[/bold]")
        cells = (column["name"], column["what"], column["low"], column["high"])
        short = (one if len(one) <= 30 else one[:29] + "…" for one in cells)
        table.add_row(*map(escape, short), f"{column['missing']:,}")
    return table

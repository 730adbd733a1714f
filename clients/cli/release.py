"""`peregrine release list | show | activate | remove`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="List, show, activate or remove releases.",
)

Repository = Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The release, such as r1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = Path("model_repository")


@app.command("list")
def list_(repository: Repository = DEFAULT, as_json: AsJson = False) -> None:
    """Every release, and which one is active."""
    from clients.operations import releases

    found = releases.list_releases(repository)
    if as_json:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("release", "created", "shop", "MB", "active")
    for info in found:
        table.add_row(
            info.name,
            info.created,
            info.shop,
            f"{info.size_bytes / 1e6:.1f}",
            "yes" if info.is_active else "",
        )
    Console().print(table if found else f"no release in {repository}; `peregrine build SHOP` makes one")


@app.command()
def show(name: Name, repository: Repository = DEFAULT, as_json: AsJson = False) -> None:
    """A release's manifest and report."""
    from clients.operations import releases

    manifest = releases.read_manifest(repository, name)
    if as_json:
        print(json.dumps(manifest, indent=1))
        return
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    console, table = Console(), Table("entry", "value", title=f"release {name}")
    for key, value in manifest.items():
        if isinstance(value, str | int | float):
            table.add_row(key, str(value))
    files = manifest.get("files", {})
    table.add_row("files", f"{len(files)}, {sum(entry['bytes'] for entry in files.values()) / 1e6:.1f} MB")
    console.print(table)
    report = repository / name / "report.md"
    if report.exists():
        console.print(Markdown(report.read_text(encoding="utf-8")))


@app.command()
def activate(name: Name, repository: Repository = DEFAULT, as_json: AsJson = False) -> None:
    """Makes a release the one that `recommend` answers with; a running server follows at once, no request
    fails."""
    from clients.operations import releases

    done = releases.activate(repository, name)
    if as_json:
        print(json.dumps(dataclasses.asdict(done), indent=1))
        return
    was = f" (was {done.previous})" if done.previous not in (None, name) else ""
    how = (
        f"; the server loaded it in {done.load_ms:.0f} ms and turned to it in {done.flip_ms:.1f} ms"
        if done.served
        else "; no server is running here"
    )
    print(f"release {name} is active{was}{how}")


@app.command()
def remove(name: Name, repository: Repository = DEFAULT) -> None:
    """Deletes a release that is not active."""
    from clients.operations import releases

    releases.remove(repository, name)
    print(f"release {name} is removed")

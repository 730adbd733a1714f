"""Runs `peregrine release list | show | needs | activate | canary | promote | abort | remove`."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption, JsonOption, RepositoryOption
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clients.operations.canaries import Change
    from clients.operations.listing import ReleaseInfo

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="List, show, try, activate or remove releases.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The release, such as r1.")]
Require = Annotated[
    str | None,
    typer.Option(
        help="What engines must run on, or it is refused: tensorrt, rtx, onnxruntime-gpu, onnxruntime."
    ),
]

Force = Annotated[
    bool,
    typer.Option("--force", help="Activate it though it is worse than the active one on held-out users."),
]


@app.command("list")
def list_(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lists every release: its id, age, size and held-out figures, and which one is active. Half copies are
    named."""
    from clients.operations.listing import list_releases
    from ensemble.release.activation import unfinished

    infos = list_releases(repository, catalogue)
    if as_json:
        print(json_text([dataclasses.asdict(info) for info in infos], indent=1))
        return
    if not infos:
        print(f"no release in {repository}; `peregrine build SHOP` makes one")
        return
    _print_table(infos)
    for info in infos:
        if info.problem:
            print(f"{info.name}: {info.problem}")
    if killed := unfinished(catalogue or repository):
        print(
            f"the {killed.what} of {killed.release} is under way, or was killed: the next `activate`, "
            "`remove` or `serve` finishes or undoes it"
        )


def _print_table(infos: Sequence[ReleaseInfo]) -> None:
    """Prints a line a release, and more where it has several held-out figures: 80 columns hold them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("release", "id", "age", "trained to", "MB", "share", "preset", "held-out figures"):
        table.add_column(column, overflow="fold")
    for info in infos:
        table.add_row(*_row(info))
    Console().print(table)


def _row(info: ReleaseInfo) -> tuple[str, ...]:
    """Writes a release's line of the table."""
    figures = "\n".join(f"{name.upper()} {value:.3f}" for name, value in info.figures.items())
    share = f"{100 * info.share:.3g}%" if info.share else ""
    size = f"{info.size_bytes / 1e6:.1f}" if info.size_bytes else ""
    is_plain = info.compression in ("", "none")
    built = info.preset if is_plain else f"{info.preset}, {info.compression}"
    return info.name, info.id[:8], _age(info.age_s), info.trained_up_to[:10], size, share, built, figures


def _age(seconds: float | None) -> str:
    """Writes an age in its largest unit: "3 h"."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


@app.command()
def show(name: Name, repository: RepositoryOption = REPOSITORY, as_json: JsonOption = False) -> None:
    """Shows a release's manifest and report."""
    from clients.operations import releases

    manifest = releases.show(repository, name)
    if as_json:
        print(json_text(manifest, indent=1))
        return
    from rich.console import Console

    from clients.cli.tables import FoldedMarkdown, folded_table

    console, table = Console(), folded_table("entry", "value", title=f"release {name}")
    for key, value in manifest.items():
        if isinstance(value, str | int | float):
            table.add_row(key, str(value))
    for model, span in manifest.get("trained", {}).items():
        table.add_row(f"{model} trained on", f"{span['events']:,} events up to {span['trained_up_to']}")
    files = manifest.get("files", {})
    table.add_row("files", f"{len(files)}, {sum(entry['bytes'] for entry in files.values()) / 1e6:.1f} MB")
    console.print(table)
    report = repository / name / "report.md"
    if report.exists():
        console.print(FoldedMarkdown(report.read_text(encoding="utf-8")))


@app.command()
def needs(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The release; the active one if not given.")
    ] = None,
    repository: RepositoryOption = REPOSITORY,
    fused: Annotated[bool, typer.Option("--fused", help="As `serve --fused`.")] = False,
    instances: Annotated[
        int | None, typer.Option(min=1, help="As `serve --instances`; as the release says if not given.")
    ] = None,
    patch: Annotated[
        bool,
        typer.Option("--patch", help="Print it as kustomize's patch: docker/kubernetes/overlays/*/shm.yaml."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Says how large /dev/shm must be where a release is served: compose's SHM, a pod's volume `shm`.

    Triton and its Python processes pass tensors there; where it is full, requests fail. It is a bound: of
    full batches of the largest requests, while one release is turned into another.
    """
    from ensemble.cli.options import active_or_named
    from ensemble.release.release import open_release
    from ensemble.release.shared_memory import shm_bytes

    release = open_release(repository, active_or_named(repository, name))
    mebibytes = shm_bytes(release.schema, fused=fused, instances=instances) >> 20
    if as_json:
        print(json_text({"release": release.name, "shm_bytes": mebibytes << 20}, indent=1))
    elif patch:
        print(_SHM_PATCH.format(mebibytes), end="")
    else:
        print(f"release {release.name} needs {mebibytes} MiB of /dev/shm at most")


_SHM_PATCH = """\
# Written by `peregrine release needs --patch`: what a release's tensors take at most.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: serve
  namespace: peregrine
spec:
  template:
    spec:
      volumes:
        - name: shm
          emptyDir: {{medium: Memory, sizeLimit: {}Mi}}
"""


@app.command()
def activate(
    name: Name,
    repository: RepositoryOption = REPOSITORY,
    require: Require = None,
    force: Force = False,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Makes a release the one that `recommend` answers with. A running server follows at once; no request
    fails.

    It is asked for real users' lists first. One that gives nonsense, hangs or crashes is refused, as is one
    that was worth less than the active one to held-out users whom neither had seen, and the old one goes on.
    """
    from clients.operations import releases

    done = releases.activate(repository, name, require, catalogue, force=force)
    if as_json:
        print(json_text(dataclasses.asdict(done), indent=1))
        return
    was = f" (was {done.previous})" if done.previous not in (None, name) else ""
    how = (
        f"; the server loaded it in {done.load_ms:.0f} ms and turned to it in {done.flip_ms:.1f} ms"
        if done.served
        else "; no server is running here"
    )
    if done.served and not done.flip_ms:
        how = "; the server answers with it already"
    print(f"release {name} is active{was}{how}")
    for line in (done.worth, *done.notes, f"warning: {done.warning}" if done.warning else ""):
        if line:
            print(line, file=sys.stderr)


Share = Annotated[float, typer.Option(metavar="PERCENT", help="How many of a hundred users it answers.")]


@app.command()
def canary(
    name: Name,
    share: Share,
    repository: RepositoryOption = REPOSITORY,
    require: Require = None,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tries a release on a share of the users: always the same ones, also when the share grows.

    What it fails the active release answers. `serve` watches it, and takes it out by itself when it is worse.
    """
    from clients.operations import canaries

    _print_change(canaries.canary(repository, name, share / 100, require, catalogue), as_json)


@app.command()
def promote(
    repository: RepositoryOption = REPOSITORY,
    require: Require = None,
    force: Force = False,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gives the release that is tried all users: it is the active one then."""
    from clients.operations import canaries

    _print_change(canaries.promote(repository, require, catalogue, force=force), as_json)


@app.command()
def abort(
    repository: RepositoryOption = REPOSITORY,
    catalogue: CatalogueOption = None,
    as_json: JsonOption = False,
) -> None:
    """Takes the release that is tried out again: the active one answers all users."""
    from clients.operations import canaries

    _print_change(canaries.abort(repository, catalogue), as_json)


def _print_change(done: Change, as_json: bool) -> None:
    """Prints what became of the route."""
    if as_json:
        print(json_text(dataclasses.asdict(done), indent=1))
        return
    ways = {
        0.0: f"has no users any more, {done.main} has all",
        1.0: "has all users: it is active",
    }
    way = ways.get(done.share, f"has {done.share:.3g} of the users, {done.main} the others")
    how = f"; the server turned in {done.flip_ms:.1f} ms" if done.served else "; no server is running here"
    print(f"release {done.release} {way}{how}")
    for line in (*done.notes, *([f"warning: {done.warning}"] if done.warning else [])):
        print(line, file=sys.stderr)


@app.command()
def remove(name: Name, repository: RepositoryOption = REPOSITORY, catalogue: CatalogueOption = None) -> None:
    """Deletes a release that is not active, or what is there of half a copy. Its name is not given again."""
    from clients.operations import releases

    releases.remove(repository, name, catalogue)
    print(f"release {name} is removed")

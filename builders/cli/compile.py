"""Runs `peregrine compile`: a release's ONNX models become plans for this machine's GPU, or for RTX cards."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.errors import ReleaseError
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from rich.table import Table

    from builders.compile.stage import Compiled


def compile_plans(
    repository: Annotated[Path, typer.Option("--repository", "-r", help="The model repository.")] = Path(
        "model_repository"
    ),
    release: Annotated[str | None, typer.Option(help="The release; the active one if not given.")] = None,
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="Plans for any GPU from SM 8.0 on and later TensorRT; a little slower."
        ),
    ] = False,
    flavor: Annotated[
        str,
        typer.Option(
            help="tensorrt, rtx (TensorRT for RTX: by pip alone, on RTX cards), or auto: what is here."
        ),
    ] = "auto",
    ahead: Annotated[
        bool,
        typer.Option("--ahead", help="Build without a GPU, for RTX cards; outputs are compared on the node."),
    ] = False,
    targets: Annotated[
        str | None,
        typer.Option("--for", help="RTX cards by compute capability, such as sm89,sm120; all if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Builds plans of a release, beside it: with TensorRT inside the serving image on the GPU node that will
    serve it, with TensorRT for RTX anywhere.

    Plans that are there and fit are kept, so a second call takes seconds; `peregrine serve` finds them by
    itself.
    """
    from builders.compile.builder import target_names
    from builders.compile.stage import compile_release, toolchain
    from ensemble.engines.flavors import TITLES
    from ensemble.progress import bar
    from ensemble.release.release import active_release
    from ensemble.release.repository import sweep

    name = release or active_release(repository)
    if name is None:
        raise ReleaseError(f"no release is active in {repository}; name one: --release NAME")
    tools = toolchain(flavor, ahead=ahead)
    wanted = target_names(targets) if targets is not None else ()
    sweep(repository, lambda line: print(line, file=sys.stderr))
    with bar(f"compile {name}") as update:
        done = compile_release(
            repository,
            name,
            tools,
            portable=portable,
            targets=wanted,
            progress=lambda share, text: update(text, share),
        )
    if as_json:
        print(
            json_text(
                {
                    "release": name,
                    "node": dataclasses.asdict(tools.node),
                    "plans": [dataclasses.asdict(one) for one in done],
                },
                indent=1,
            )
        )
        return
    from rich.console import Console

    node = tools.node
    cards = f"SM {', '.join(wanted)}" if wanted else "RTX cards"
    console = Console()
    console.print(
        _table(
            done, f"plans of release {name} for {node.gpu or cards}, {TITLES[node.flavor]} {node.tensorrt}"
        )
    )
    for one in done:
        for note in one.notes:
            console.print(f"{one.model}: {note}", highlight=False, markup=False, soft_wrap=True)


def _table(done: list[Compiled], title: str) -> Table:
    from rich.table import Table

    table = Table("engine", "precision", "seconds", "MB", "error against onnxruntime", "key", title=title)
    for one in done:
        seconds = "was there" if one.reused else f"{one.duration_s:.1f}"
        table.add_row(
            one.model,
            one.precision,
            seconds,
            f"{one.size_bytes / 1e6:.2f}",
            "not opened here" if one.relative_error is None else f"{one.relative_error:.1e}",
            one.key,
        )
    return table

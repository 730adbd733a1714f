"""Runs `peregrine compile`: a shipped release's ONNX models become TensorRT plans for this machine's GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.errors import ReleaseError

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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Builds TensorRT plans of a release, beside it: run this inside the serving image on the GPU node that
    will serve it.

    Plans that are there and fit are kept, so a second call takes seconds; `peregrine serve` finds them by
    itself.
    """
    from builders.compile.stage import compile_release, tensorrt_toolchain
    from ensemble.progress import bar
    from ensemble.release.release import active_release
    from ensemble.release.repository import sweep

    name = release or active_release(repository)
    if name is None:
        raise ReleaseError(f"no release is active in {repository}; name one: --release NAME")
    tools = tensorrt_toolchain()
    sweep(repository, lambda line: print(line, file=sys.stderr))
    with bar(f"compile {name}") as update:
        done = compile_release(
            repository, name, tools, portable=portable, progress=lambda share, text: update(text, share)
        )
    if as_json:
        print(
            json.dumps(
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

    Console().print(
        _table(done, f"plans of release {name} for {tools.node.gpu}, TensorRT {tools.node.tensorrt}")
    )


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
            f"{one.relative_error:.1e}",
            one.key,
        )
    return table

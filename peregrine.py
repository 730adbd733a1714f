"""Runs the one console command. Each subcommand is imported when it is called, so `peregrine --help` needs
nothing but Python."""

from __future__ import annotations

import errno
import importlib
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """Says where a subcommand lives: a typer app, or a function that becomes one."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "shop": Command(
        "builders.cli.shop", "app", "Generate, import or check a shop: interactions, items, users."
    ),
    "build": Command(
        "builders.cli.build", "build", "Train, export, index and verify a shop's models; publish a release."
    ),
    "tune": Command(
        "builders.cli.tune",
        "tune",
        "Search the settings that are worth most to a shop; end in a preset file.",
    ),
    "encoders": Command(
        "builders.cli.encoders", "app", "Fine-tune the encoders of titles and pictures on a shop itself."
    ),
    "evaluate": Command(
        "builders.cli.evaluate",
        "evaluate",
        "Ask a release about users at a time that its model has not seen.",
    ),
    "compare": Command(
        "builders.cli.compare",
        "app",
        "Compare ways of compressing a shop's models: distillation losses, precision plans.",
    ),
    "compile": Command(
        "builders.cli.compile",
        "compile_plans",
        "Build TensorRT plans of a release, on the GPU node that will serve it.",
    ),
    "report": Command(
        "builders.cli.report",
        "report",
        "Write a release's report as a page: ranking, compression, gate, latency.",
    ),
    "release": Command("clients.cli.release", "app", "List, show, activate or remove releases."),
    "push": Command(
        "clients.cli.store", "push", "Bring releases, route and items into a store (S3, a folder)."
    ),
    "pull": Command("clients.cli.store", "pull", "Bring onto a node what a store has: only what is missing."),
    "items": Command("clients.cli.items", "app", "Add, change and remove items while they are served."),
    "serve": Command("ensemble.cli.serve", "serve", "Serve the active release with Triton, over gRPC."),
    "status": Command("ensemble.cli.status", "status", "Say how a repository is served, and what is wrong."),
    "recommend": Command("clients.cli.recommend", "recommend", "Ask for ranked lists."),
    "search": Command("clients.cli.search", "search", "Find what fits a text or a picture."),
    "features": Command("ensemble.cli.features", "app", "Load feature rows into Redis; measure the tiers."),
    "events": Command("clients.cli.events", "app", "Write live events into the feature rows."),
    "bench": Command(
        "clients.cli.bench", "bench", "Measure latency, throughput and cost of a served release."
    ),
}
# The extra that brings what could not be imported.
_EXTRAS = {
    "serve": ("faiss", "onnxruntime", "typer", "rich", "fsspec", "waitress", "prometheus_client"),
    "redis": ("redis", "hiredis"),
    "build": (
        "torch",
        "onnx",
        "onnxscript",
        "pyarrow",
        "pydantic",
        "psutil",
        "matplotlib",
        "PIL",
        "sklearn",
        "optuna",
    ),
}


def main() -> None:
    """Runs the command line and exits: 0, 2 for what the caller can fix (one line on stderr), 130 after
    Ctrl-C."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(_version())
        sys.exit(0)
    if arguments[0] not in COMMANDS:
        _fail(f"peregrine has no command {arguments[0]!r}; it has: {', '.join(COMMANDS)}")
    _run(arguments[0], arguments[1:])


def _run(name: str, arguments: list[str]) -> None:
    """Runs a subcommand; errors that a user can fix become one line and exit code 2."""
    from ensemble.errors import PeregrineError

    try:
        _app(COMMANDS[name])(arguments, prog_name=f"peregrine {name}")
    except PeregrineError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in _EXTRAS.items() if missing in modules), None)
        if extra is None:
            raise
        _fail(
            f"`peregrine {name}` needs {missing}, which is not installed; cure: pip install "
            f"'peregrine-recommender[{extra}]'"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}; make room, and try again")
    except KeyboardInterrupt:
        sys.exit(130)


def _app(command: Command) -> Any:
    """Imports a subcommand and gives its typer app."""
    import typer

    target = getattr(importlib.import_module(command.module), command.attribute)
    if isinstance(target, typer.Typer):
        return target
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=target.__doc__ or command.help)(target)
    return app


def _usage() -> str:
    """Writes what `peregrine --help` prints."""
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: peregrine COMMAND …",
            "",
            "A shop's interactions, catalogue and PyTorch models in; ranked lists over gRPC out of Triton.",
            "",
            "Commands:",
            *lines,
            "",
            "`peregrine COMMAND --help` says more. Exit codes: 0 done, 2 something to fix (one line says "
            "what), 130 interrupted.",
        ]
    )


def _version() -> str:
    """Gives the installed version, or says that there is none."""
    import importlib.metadata

    try:
        return importlib.metadata.version("peregrine-recommender")
    except importlib.metadata.PackageNotFoundError:
        return "source tree, not installed"


def _fail(message: str) -> None:
    """Prints an error in one line and exits with 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

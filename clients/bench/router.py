"""Measures what a canary costs while it lasts: the router that splits the users, and a second release.

    python -m clients.bench.router --repository REPOSITORY --canary r2 --share 5

Serves a copy of the repository both ways, as an ensemble and fused, without a canary and with one in turn:
the latency of a lone request, and the throughput with --concurrency in flight. Medians of --rounds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.loadgen import Load, prepare, users_file_of
from clients.bench.machine import machine
from clients.operations import canaries
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.json_text import json_text
from ensemble.progress import say
from ensemble.release.release import served_releases
from ensemble.release.repository import require_active
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Gives {way: {"without" or "with": {figure: its median}}}."""
    with tempfile.TemporaryDirectory(prefix="peregrine-router-") as folder:
        repository = Path(folder) / "repository"
        shutil.copytree(given.repository, repository, symlinks=True)
        return {way: _of_way(repository, given, fused=way == "fused") for way in ("ensemble", "fused")}


def _of_way(repository: Path, given: argparse.Namespace, *, fused: bool) -> dict[str, Any]:
    """Measures one way of serving, without a canary and with it in turn."""
    figures: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=fused), say) as server:
        for _ in range(given.rounds):
            figures["without"].append(_figures(server, repository, given))
            canaries.canary(repository, given.canary, given.share / 100)
            figures["with"].append(_figures(server, repository, given))
            if given.canary not in served_releases(repository):
                raise ReleaseError(f"{given.canary} was taken out while it was measured")
            canaries.abort(repository)
    return {
        what: {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}
        for what, rounds in figures.items()
    }


def _figures(server: Server, repository: Path, given: argparse.Namespace) -> dict[str, float]:
    """Asks one request after another, then many at once."""
    users = users_file_of(repository / require_active(repository))
    lone, many = (
        prepare(Load(server.url, users, given.seconds, concurrency=concurrency).to_spec())()
        for concurrency in (1, given.concurrency)
    )
    return {
        "lone_p50_ms": lone["p50_ms"],
        "lone_p99_ms": lone["p99_ms"],
        "per_s": many["achieved_per_s"],
        "p99_ms": many["p99_ms"],
        "failed": float(lone["failed"] + many["failed"]),
    }


def main() -> None:
    """Reads the command line, measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--canary", required=True, help="the release that is tried beside the active one")
    parser.add_argument("--share", type=float, default=5.0, help="percent of the users")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    try:
        print(json_text({**machine(), "figures": measure(given)}, indent=1))
    except PeregrineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Replaces two servers one after the other while they are asked by way of the gateway, as Kubernetes would.

A store stands between a home, where a release is turned to and an item is added meanwhile, and the servers,
which pull and follow. Each server is what docker/kubernetes says of a pod, as processes: the init container's
pull, then serve and the follower; asked by its probe; off the gateway's list, preStop's pause, SIGTERM, the
grace. None is ended before another is ready.

    make rolling                       # the demo's release; with a second one, it is turned to on the way
    python -m clients.bench.rolling --repository model_repository --to r2 --json rolling.json
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from pathlib import Path

from clients.bench.gateway import missing
from clients.bench.machine import machine
from clients.bench.rolling.update import Outcome, roll
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.repository import require_folder


def free_ports(count: int) -> list[int]:
    """Gives ports of 127.0.0.1 that nobody listens on."""
    with_all = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in with_all]
    for one in with_all:
        one.close()
    return ports


def report(outcome: Outcome) -> str:
    """Writes what came of it, a line each."""
    of = ", ".join(f"{count} by {name}" for name, count in outcome.releases.items())
    lines = [
        f"{outcome.sent} lists asked for ({of}), {outcome.failed} failed, {outcome.mixed} mixed releases",
        f"two servers replaced in {outcome.seconds:.0f} s",
        f"a new one was ready after {outcome.ready_s} s, an old one ended {outcome.end_s} s after SIGTERM",
        f"p50 / p99: {outcome.p50_ms} / {outcome.p99_ms} ms before, while, after",
        f"the item that was added meanwhile is on both new ones, {outcome.item_s:.0f} s later at the latest",
    ]
    if outcome.turn_s is not None:
        lines.append(f"and so is the release, {outcome.turn_s:.0f} s after it was turned to at home")
    return "\n".join([*lines, *(f"failed: {text}" for text in outcome.failures)])


def main(arguments: list[str] | None = None) -> None:
    """Rolls and prints what came of it; exit code 1 if a request failed or mixed releases, 2 if it could
    not be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--to", metavar="RELEASE", help="a release of it that is turned to on the way")
    parser.add_argument("--rate", type=float, default=20.0, help="lists a second (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        if lacks := missing():
            raise InvalidInput(lacks)
        require_folder(given.repository)
        with tempfile.TemporaryDirectory(prefix="peregrine-rolling-") as folder:
            say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            outcome = roll(given.repository, Path(folder), free_ports(10), given.rate, given.to, say)
        if given.json:
            figures = {**machine(), "rate": given.rate, **vars(outcome)}
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, ModuleNotFoundError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(report(outcome))
    sys.exit(1 if outcome.failed or outcome.mixed else 0)


if __name__ == "__main__":
    main()

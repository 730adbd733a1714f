"""Measures what changes of the route cost the callers: activation, going back, a canary and its promotion.

    python -m clients.bench.turns --repository REPOSITORY --other r2

Serves a copy of the repository both ways, asks at Poisson times all the while (open loop), and turns from the
active release to the other and back. A list is wrong if it is neither release's own for that user; the p99 of
calls during a change stands beside that of the calls before.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clients.bench.loadgen import poisson_times
from clients.bench.machine import machine
from clients.bench.measuring_process import Measure, MeasuringProcess, serve_measurement
from clients.client import Client
from clients.errors import CallError
from clients.operations import canaries, releases
from ensemble.arrays import Array
from ensemble.errors import PeregrineError
from ensemble.json_text import json_text
from ensemble.progress import say
from ensemble.release.repository import require_active
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

RIGHT, WRONG, FAILED = 0, 1, 2
_USERS, _TOP_K, _AGREE = (
    64,
    10,
    9,
)  # near ties fall otherwise in another batch: 9 of 10 items are the same list
_WORKERS, _QUIET_S, _LINGER_S = 32, 3.0, 0.5


class Change(NamedTuple):
    """Names a change of the route that was made, and when, in seconds of the epoch."""

    what: str
    start: float
    end: float


def prepare(spec: dict[str, Any]) -> Measure:
    """Makes the asking of a spec: url, users, lists {release: a list each}, rate, seconds."""
    client = Client(spec["url"])
    lists = {name: [set(one) for one in each] for name, each in spec["lists"].items()}
    rng = np.random.default_rng(0)
    due = poisson_times(spec["rate"], spec["seconds"], rng)
    users = rng.integers(0, len(spec["users"]), len(due))

    def call(start: float, number: int) -> tuple[float, float, int]:
        """Sends one request at its time; gives (when it was due, ms until its answer, verdict)."""
        at = start + due[number]
        time.sleep(max(0.0, at - time.time()))
        try:
            answer = client.recommend(spec["users"][users[number]], top_k=_TOP_K)
        except CallError:
            return at, (time.time() - at) * 1e3, FAILED
        wanted = lists.get(answer.release, [set()] * len(spec["users"]))[users[number]]
        is_right = len(wanted & set(answer.item_ids)) >= _AGREE
        return at, (time.time() - at) * 1e3, RIGHT if is_right else WRONG

    def measure() -> dict[str, Any]:
        start = time.time()
        with ThreadPoolExecutor(_WORKERS) as pool:
            return {"calls": list(pool.map(lambda number: call(start, number), range(len(due))))}

    return measure


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Gives {way: {change: its figures}}."""
    with tempfile.TemporaryDirectory(prefix="peregrine-turns-") as folder:
        repository = Path(folder) / "repository"
        shutil.copytree(given.repository, repository, symlinks=True)
        return {way: _of_way(repository, given, fused=way == "fused") for way in ("ensemble", "fused")}


def _of_way(repository: Path, given: argparse.Namespace, *, fused: bool) -> dict[str, Any]:
    """Turns there and back for given.seconds under load."""
    main = require_active(repository)
    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=fused), say) as server:
        users, lists = _lists_of_both(repository, server, main, given.other)
        spec = {"url": server.url, "users": users, "lists": lists}
        asking = MeasuringProcess(
            "clients.bench.turns", {**spec, "rate": given.rate, "seconds": given.seconds}
        )
        asking.ready()
        asking.go()
        changes = _turn_until(time.time() + given.seconds, repository, main, given)
        calls = np.array(asking.result()["calls"])
    return dict(_figures(calls, changes))


def _lists_of_both(
    repository: Path, server: Server, main: str, other: str
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Asks each release alone for the lists of some users; the first is active again afterwards."""
    users, lists = [f"u{number}" for number in range(_USERS)], dict[str, list[list[str]]]()
    for name in (other, main):
        releases.activate(repository, name, force=True)
        with Client(server.url) as client:
            lists[name] = [list(client.recommend(user, top_k=_TOP_K).item_ids) for user in users]
    return users, lists


def _turn_until(end: float, repository: Path, main: str, given: argparse.Namespace) -> list[Change]:
    """Changes the route, with a pause before each change, for as long as a whole round may fit."""
    other, changes, longest = given.other, list[Change](), 0.0
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("activate", lambda: releases.activate(repository, other, force=True)),
        ("go back", lambda: releases.activate(repository, main, force=True)),
        ("canary", lambda: canaries.canary(repository, other, given.share / 100)),
        ("promote", lambda: canaries.promote(repository, force=True)),
        ("go back", lambda: releases.activate(repository, main, force=True)),
    ]
    while time.time() + longest < end - _QUIET_S:
        begun = time.time()
        for what, change in steps:
            time.sleep(_QUIET_S)
            start = time.time()
            change()
            changes.append(Change(what, start, time.time() + _LINGER_S))
        longest = max(longest, time.time() - begun)
    return changes


def _figures(calls: Array, changes: list[Change]) -> Iterator[tuple[str, dict[str, float]]]:
    """Gives the figures of calls [R, 3] before and between the changes, and during each kind of change."""
    during = {
        what: np.any(
            [(calls[:, 0] >= c.start) & (calls[:, 0] < c.end) for c in changes if c.what == what], axis=0
        )
        for what in dict.fromkeys(change.what for change in changes)
    }
    quiet = ~np.any(list(during.values()), axis=0)
    for what, chosen in {"no change": quiet, **during}.items():
        part = calls[chosen]
        yield (
            what,
            {
                "changes": sum(change.what == what for change in changes),
                "calls": len(part),
                "failed": int((part[:, 2] == FAILED).sum()),
                "wrong": int((part[:, 2] == WRONG).sum()),
                "p50_ms": float(np.median(part[:, 1])),
                "p99_ms": float(np.percentile(part[:, 1], 99)),
            },
        )


def main() -> None:
    """Reads the command line, measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--other", required=True, help="the release that is turned to and back from")
    parser.add_argument("--share", type=float, default=20.0, help="percent of the users of the canary")
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    try:
        print(json_text({**machine(), "figures": measure(given)}, indent=1))
    except PeregrineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main() if len(sys.argv) > 1 else serve_measurement(prepare)

"""Measures what a client's second calls cost, and what they gain: with and without them, by turns.

    python -m clients.bench.hedges --repository REPOSITORY [--seconds S] [--rounds N] [--json F]

Two servers of one release answer a client at 60% of what a closed loop gets (open loop, a budget of 1 s).
`quiet`: nothing is done to them. `pauses`: a process of the first server is stopped for .5 s every 2 s, which
is shorter than what is repaired. Extra calls are the second ones of a request that is late, as a share of all
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clients.aio import AsyncClient
from clients.bench.faults import closed_loop
from clients.bench.inputs import working_copy
from clients.bench.machine import machine
from clients.bench.starred.load import some_users
from clients.policy import Allowance
from ensemble.contract import Degraded
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.release import open_release
from ensemble.release.repository import require_active, require_folder
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

_SHARE, _MAX_RATE, _BUDGET_MS, _WARM = 0.6, 150.0, 1000.0, 200
_PAUSE_S, _PERIOD_S = 0.5, 2.0
Row = dict[str, Any]


async def _asked(urls: list[str], users: list[str], rate: float, seconds: float, is_hedged: bool) -> Row:
    """Asks at Poisson times; gives each answer's milliseconds, and counts the second calls."""
    rng, took, counts = random.Random(0), list[float](), {"failed": 0, "popular": 0}
    async with AsyncClient(urls, budget_ms=_BUDGET_MS) as client:
        if not is_hedged:
            client._hedges = Allowance(0.0, 0.0, 0.0)

        async def ask(user: str, due: float) -> None:
            try:
                answer = await client.recommend(user)
                counts["popular"] += bool(answer.degraded & Degraded.POPULAR)
            except PeregrineError:
                counts["failed"] += 1
            took.append(1e3 * (time.monotonic() - due))

        for user in (users * 2)[:_WARM]:  # so that it knows what is usual
            await client.recommend(user, budget_ms=30_000)
        before = client._hedges.taken
        end, due, tasks = time.monotonic() + seconds, time.monotonic(), list[asyncio.Task[None]]()
        while due < end:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(users[len(tasks) % len(users)], due)))
        await asyncio.gather(*tasks)
        return {"took_ms": took, "extra": client._hedges.taken - before, **counts}


def _ask(*given: Any) -> Row:
    """Asks in a process of its own."""
    return asyncio.run(_asked(*given))


@contextlib.contextmanager
def _pausing(server: Server) -> Iterator[None]:
    """Stops a process of a server again and again, for less than what is repaired."""
    end = threading.Event()

    def pause() -> None:
        while not end.wait(_PERIOD_S - _PAUSE_S):
            pid = next(iter(server.stubs().values()))[0]
            os.kill(pid, signal.SIGSTOP)
            end.wait(_PAUSE_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=pause, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _row(name: str, is_hedged: bool, runs: list[Row]) -> Row:
    """Sums up the rounds of one way of asking."""
    took = np.concatenate([run["took_ms"] for run in runs])
    p50, p99, p999 = (round(float(np.percentile(took, q)), 1) for q in (50, 99, 99.9))
    extra = sum(run["extra"] for run in runs)
    counts = {what: sum(run[what] for run in runs) for what in ("failed", "popular")}
    figures = {"p50_ms": p50, "p99_ms": p99, "p999_ms": p999, "extra_share": round(extra / len(took), 4)}
    return {"servers": name, "hedges": is_hedged, "sent": len(took), **figures, "extra": extra, **counts}


def table(rows: list[Row]) -> str:
    """Writes the rows as a Markdown table."""
    head = ["servers", "hedges", "sent", "p50 ms", "p99 ms", "p99.9 ms", "extra calls", "failed", "popular"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [
            row["servers"],
            "with" if row["hedges"] else "without",
            row["sent"],
            row["p50_ms"],
            row["p99_ms"],
        ]
        cells += [row["p999_ms"], f"{row['extra_share']:.1%}", row["failed"], row["popular"]]
        lines.append(list(map(str, cells)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Asks two servers with and without second calls, by turns, quiet and with pauses."""
    name, rows = require_active(given.repository), list[Row]()
    copy = working_copy(given.repository, folder / "repository")
    users = some_users(open_release(copy, name))
    spawn = multiprocessing.get_context("spawn")

    def options(state: str) -> ServeOptions:
        return ServeOptions(port=0, metrics_port=None, fused=given.fused, state=folder / state)

    with serve(copy, options("one")) as one, serve(copy, options("two")) as two:
        for server in (one, two):
            closed_loop(server.url, users, 16)
        began = time.monotonic()
        closed_loop(one.url, users * 2, 16)
        capacity = 2 * len(users) / (time.monotonic() - began)
        rate = min(_MAX_RATE, _SHARE * capacity)
        for what in ("quiet", "pauses"):
            runs: dict[bool, list[Row]] = {True: [], False: []}
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                for turn in range(2 * given.rounds):
                    is_hedged = turn % 2 == 0
                    print(f"{what}, {'with' if is_hedged else 'without'} second calls", file=sys.stderr)
                    with _pausing(one) if what == "pauses" else contextlib.nullcontext():
                        asked = pool.submit(_ask, [one.url, two.url], users, rate, given.seconds, is_hedged)
                        runs[is_hedged].append(asked.result())
            rows += [_row(what, is_hedged, some) for is_hedged, some in runs.items()]
    facts = {"release": name, "capacity": round(capacity, 1), "rate": round(rate, 1)}
    return {**machine(), **facts, "seconds": given.seconds, "rounds": given.rounds, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Asks and prints the table; exit code 2 if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.bench.hedges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=2, help="with second calls, and as many without")
    parser.add_argument("--fused", action="store_true", help="serve the whole pipeline as one step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        for name in ("seconds", "rounds"):
            if getattr(given, name) <= 0:
                raise InvalidInput(f"--{name}: must be above 0, got {getattr(given, name):g}")
        require_folder(given.repository)
        with tempfile.TemporaryDirectory(prefix="peregrine-hedges-") as folder:
            figures = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, OSError, EOFError) as error:
        parser.exit(2, f"error: {error}\n")
    print(table(figures["rows"]))
    print(f"\n{figures['rate']:.0f} requests a second, of {figures['capacity']:.0f} in a closed loop.")


if __name__ == "__main__":
    main()

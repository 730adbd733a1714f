"""Runs the faults that must not be felt against a real server, in both ways of serving: PASS or FAIL.

    python -m clients.bench.starred --repository REPOSITORY [--seconds S] [--only NAME,…] [--all] [--json F]

Each test serves a copy of the repository, learns the healthy list of each user, measures what a closed loop
gets, and asks at 60% of that at Poisson times (open loop) through the product's own client, with a budget of
one second. Every answer that does not say POPULAR is held against the user's healthy list.

failed: an error came. wrong: an unflagged list that differs beyond ties. lost: a call that never ended.
degraded: a list that says so. recovery: from the harm to the last answer that failed or was degraded.

stub        kill -9 of one process of two of a model (with --all: of each model in turn)
stubs       kill -9 of all processes of a model
stopped     SIGSTOP of a process of a model for 5 s
server      kill -9 of tritonserver
frozen      SIGSTOP of tritonserver for 5 s
drain       SIGTERM of one server of two
overload    ten times the capacity without budgets, some calls of high priority; a call has several users,
            so that it is not who asks that is too slow
storm       budgets of .2 to 5 ms
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clients.aio import AsyncClient
from clients.bench.faults import closed_loop, is_right
from clients.bench.machine import machine
from clients.client import Client
from clients.errors import BudgetExceeded, Overloaded
from clients.policy import MAX_IN_FLIGHT
from clients.results import Recommendations
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.release import open_release
from ensemble.release.repository import require_active
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

_USERS, _SHARE, _MAX_RATE, _BUDGET_MS, _RECOVERY_S = 150, 0.6, 150.0, 1000.0, 5.0
_GOODPUT, _REJECT_P50_MS, _REJECT_P99_MS, _BACK_S = 0.9, 5.0, 20.0, 2.0
_STOPPED_S = 5.0
_OVERLOAD_USERS, _OVERLOAD_IN_FLIGHT, _TIMES, _LEAST_TIMES = 8, 32, 10, 5
_LOST_S = 30.0
Row = dict[str, Any]
# due, done, user, answer, error's class and text
Note = tuple[float, float, str, Recommendations | None, str]


async def _ask(
    client: AsyncClient, user: str, due: float, notes: list[Note], options: dict[str, Any]
) -> None:
    """Asks once and notes what came."""
    answer, error, began = None, "", time.monotonic()
    many = options.pop("users", None)
    try:
        if many:
            answer = (await client.recommend_many(many, top_k=10, **options))[0]
        else:
            answer = await client.recommend(user, top_k=10, **options)
    except PeregrineError as problem:
        error = f"{type(problem).__name__}: {problem}"
        due = began if isinstance(problem, Overloaded) else due  # refused at once, however late it was asked
    notes.append((due, time.monotonic(), user, answer, error))


async def _load(urls: list[str], users: list[str], rate: float, pipe: Any, kind: str) -> list[Note]:
    """Asks at Poisson times until `pipe` says enough."""
    notes, rng, tasks = list[Note](), random.Random(0), set[asyncio.Task[None]]()
    budget = None if kind == "overload" else _BUDGET_MS
    most = _OVERLOAD_IN_FLIGHT if kind == "overload" else MAX_IN_FLIGHT
    async with AsyncClient(urls, budget_ms=budget, fallback=kind != "overload", max_in_flight=most) as client:
        with contextlib.suppress(PeregrineError):
            await client.recommend(users[0], budget_ms=30_000)
        await asyncio.sleep(0.5)
        pipe.send("asking")
        due, count = time.monotonic(), 0
        while not pipe.poll():
            due += rng.expovariate(rate)
            if (ahead := due - time.monotonic()) > 0.001:
                await asyncio.sleep(ahead)
            elif not count % 20:
                await asyncio.sleep(0)
            options: dict[str, Any] = {"budget_ms": rng.uniform(0.2, 5)} if kind == "storm" else {}
            if kind == "overload":
                start = count % len(users)
                options["users"] = (users[start:] + users[:start])[:_OVERLOAD_USERS]
                if not count % 50:
                    options["priority"] = "high"
            task = asyncio.create_task(_ask(client, users[count % len(users)], due, notes, options))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            count += 1
        _, lost = await asyncio.wait(tasks, timeout=_LOST_S) if tasks else (set(), set())
        notes += [(due, due + _LOST_S, "", None, "lost")] * len(lost)
    return notes


def _load_process(urls: list[str], users: list[str], rate: float, pipe: Any, kind: str) -> None:
    """Is the process that asks: what is done to servers must not take its GIL."""
    pipe.send(asyncio.run(_load(urls, users, rate, pipe, kind)))


@dataclass
class Bench:
    """Holds what is asked of the servers of one test, and what is right."""

    seconds: float
    users: list[str]
    urls: list[str] = field(default_factory=list)
    capacity: float = 0.0
    rate: float = 0.0
    healthy: dict[str, Recommendations] = field(default_factory=dict)

    def learn(self, url: str) -> None:
        """Notes healthy lists and the capacity."""
        closed_loop(url, self.users[:50], 16)
        notes = closed_loop(url, self.users, 16, 30)
        self.healthy = {one.user_id: one for *_, one in notes if isinstance(one, Recommendations)}
        began = time.monotonic()
        asked = self.users * 2
        closed_loop(url, asked, 16)
        self.capacity = len(asked) / (time.monotonic() - began)
        self.rate = min(_MAX_RATE, _SHARE * self.capacity)

    def run(self, harm: Callable[[], None], kind: str = "", rate: float = 0.0) -> tuple[list[Note], float]:
        """Asks, does harm after a while, goes on until everything should be well; gives notes and when."""
        ours, its = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_load_process, args=(self.urls, self.users, rate or self.rate, its, kind), daemon=True
        )
        process.start()
        its.close()
        ours.recv()
        time.sleep(self.seconds)
        began = time.monotonic()
        harm()
        time.sleep(max(0.0, began + self.seconds + _RECOVERY_S + 2 - time.monotonic()))
        ours.send("enough")
        notes: list[Note] = ours.recv()
        process.join(10)
        return notes, began

    def row(self, name: str, notes: list[Note], began: float) -> Row:
        """Counts what came of a test."""
        row: Row = {"test": name, "sent": len(notes), "ok": 0, "degraded": 0, "failed": 0, "wrong": 0}
        row |= {"lost": 0, "failures": [], "recovery_s": 0.0}
        for due, done, user, answer, error in notes:
            if answer is None:
                row["lost" if error == "lost" else "failed"] += 1
                row["failures"] = sorted({*row["failures"], error})[:5]
                is_bad = True
            else:
                extra = answer.degraded & ~self.healthy[user].degraded
                is_bad = bool(extra)
                row["degraded"] += is_bad
                ok = bool(answer.items) if is_bad else is_right(answer, self.healthy[user])
                row["wrong"] += not ok
                row["ok"] += ok and not is_bad
            if is_bad and due >= began:
                row["recovery_s"] = max(row["recovery_s"], round(done - began, 2))
        took = {
            phase: [1e3 * (done - due) for due, done, *_ in notes if (due >= began) == (phase == "during")]
            for phase in ("before", "during")
        }
        row |= {
            f"p99_ms_{name}": round(float(np.percentile(some or [0], 99)), 1) for name, some in took.items()
        }
        return row


def _model(server: Server) -> str:
    """Names the model that is harmed: the ranker, or the whole pipeline where it is one process."""
    stubs = server.stubs()
    return next((name for name in stubs if name.endswith("_ranker")), next(iter(stubs)))


def _killed(server: Server, bench: Bench, count: int, model: str = "") -> Row:
    """Kills processes of a model."""
    pids = server.stubs()[model or _model(server)][:count]

    def harm() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    notes, began = bench.run(harm)
    return bench.row("stub" if count == 1 else "stubs", notes, began)


def _stopped(server: Server, bench: Bench, pid: int, name: str) -> Row:
    """Stops a process, and lets it go on if it is still there."""

    def harm() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_STOPPED_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    notes, began = bench.run(harm)
    return bench.row(name, notes, began)


def _drain(server: Server, bench: Bench, other: Server) -> Row:
    """Stops one server of two while both are asked."""
    bench.urls = [server.url, other.url]
    notes, began = bench.run(other.stop)
    return bench.row("drain", notes, began)


def _overload(server: Server, bench: Bench) -> Row:
    """Asks for ten times what the server can."""
    capacity = _capacity_of_many(server.url, bench.users)
    resident, _ = server.memory_bytes()
    notes, began = bench.run(lambda: None, "overload", rate=_TIMES * capacity)
    row = bench.row("overload", [one for one in notes if not one[4].startswith(Overloaded.__name__)], began)
    rejected = [
        1e3 * (done - due) for due, done, _, _, error in notes if error.startswith(Overloaded.__name__)
    ]
    span = max(done for _, done, *_ in notes) - min(due for due, *_ in notes)
    row["sent"], row["rejected"] = len(notes), len(rejected)
    sending = max(due for due, *_ in notes) - min(due for due, *_ in notes)
    row["goodput"] = round(row["ok"] / span / capacity, 2)
    row["offered"] = round(len(notes) / sending / capacity, 1)
    row["reject_p50_ms"], row["reject_p99_ms"] = (
        round(float(np.percentile(rejected or [0], q)), 1) for q in (50, 99)
    )
    row["memory_growth"] = round(server.memory_bytes()[0] / resident - 1, 3)
    back = closed_loop(server.url, bench.users[:20], 4)
    row["back_ms"] = round(max(1e3 * (done - due) for due, done, _ in back), 1)
    return row


def _capacity_of_many(url: str, users: list[str], calls: int = 60) -> float:
    """Gives how many calls for several users a closed loop gets a second."""
    with Client(url, fallback=False) as client, ThreadPoolExecutor(16) as pool:
        many = users[:_OVERLOAD_USERS]
        list(pool.map(lambda _: client.recommend_many(many, top_k=10), range(16)))
        began = time.monotonic()
        list(pool.map(lambda _: client.recommend_many(many, top_k=10), range(calls)))
    return calls / (time.monotonic() - began)


def _storm(server: Server, bench: Bench) -> Row:
    """Asks with budgets that hardly anybody can keep."""
    first = server.pid
    notes, began = bench.run(lambda: None, "storm")
    row = bench.row("storm", notes, began)
    expected = (BudgetExceeded.__name__, Overloaded.__name__)
    refused = sum(error.startswith(expected) for *_, error in notes)
    row["failed"] -= refused
    row["refused"], row["same_server"] = refused, server.pid == first
    return row


def _every_stub(server: Server, bench: Bench) -> list[Row]:
    """Kills one process of each model in turn."""
    return [{**_killed(server, bench, 1, model), "test": f"stub {model}"} for model in server.stubs()]


TESTS = ("stub", "stubs", "stopped", "server", "frozen", "drain", "overload", "storm")


def run_test(
    name: str, server: Server, bench: Bench, second: Callable[[], Any], *, is_all: bool
) -> list[Row]:
    """Runs one test against a healthy server."""
    bench.urls = [server.url]
    bench.learn(server.url)
    if name == "stub":
        return _every_stub(server, bench) if is_all else [_killed(server, bench, 1)]
    if name == "stubs":
        return [_killed(server, bench, 100)]
    if name == "stopped":
        return [_stopped(server, bench, server.stubs()[_model(server)][0], name)]
    if name == "server":
        notes, began = bench.run(lambda: os.kill(server.pid, signal.SIGKILL))
        return [bench.row(name, notes, began)]
    if name == "frozen":
        return [_stopped(server, bench, server.pid, name)]
    if name == "drain":
        with second() as other:
            return [_drain(server, bench, other)]
    return [_overload(server, bench) if name == "overload" else _storm(server, bench)]


def misses(row: Row) -> list[str]:
    """Names the targets that a row misses."""
    missed = [f"{name} {row[name]}" for name in ("failed", "wrong", "lost") if row[name]]
    if row["test"].startswith("overload"):
        limits = (
            ("offered", row["offered"] >= _LEAST_TIMES),
            ("goodput", row["goodput"] >= _GOODPUT),
            ("reject_p50_ms", row["reject_p50_ms"] <= _REJECT_P50_MS),
            ("reject_p99_ms", row["reject_p99_ms"] <= _REJECT_P99_MS),
            ("memory_growth", row["memory_growth"] <= 0.1),
            ("back_ms", row["back_ms"] <= 1e3 * _BACK_S),
        )
        return missed + [f"{name} {row[name]}" for name, is_met in limits if not is_met]
    if row["test"] == "storm":
        return missed + ([] if row["same_server"] else ["tritonserver died"])
    limit_s = _RECOVERY_S * (2 if row["test"] in ("server", "frozen") else 1)
    return missed + ([f"recovery {row['recovery_s']} s"] if row["recovery_s"] > limit_s else [])


_COLUMNS = ("test", "way", "sent", "ok", "degraded", "failed", "wrong", "lost")


def table(rows: list[Row]) -> str:
    """Writes the rows as a Markdown table."""
    head = [*_COLUMNS, "p99 ms", "recovery s", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        verdict = ", ".join(misses(row))
        cells = [*(row[name] for name in _COLUMNS), f"{row['p99_ms_before']} / {row['p99_ms_during']}"]
        cells += [row["recovery_s"], f"FAIL: {verdict}" if verdict else "PASS"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the tests that were named, each on servers of its own, in both ways of serving."""
    name = require_active(given.repository)
    copy = folder / "repository"
    shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".build", ".lock", ".servers"))
    release, rng, rows = open_release(copy, name), np.random.default_rng(0), list[Row]()
    known = release.user_ids.ids_from_rows(1 + rng.permutation(len(release.user_ids))[:_USERS])
    users = [user.decode() for user in known]
    for way in given.ways:

        @contextlib.contextmanager
        def served(state: str, way: str = way) -> Iterator[Server]:
            options = ServeOptions(
                port=0, metrics_port=None, fused=way == "fused", state=folder / state, start_timeout_s=120
            )
            with serve(copy, options) as server:
                yield server

        for test in given.only:
            with served("state") as server:
                bench = Bench(given.seconds, users)
                found = run_test(test, server, bench, lambda: served("other"), is_all=given.all)
            rows += [{**row, "way": way, "capacity": round(bench.capacity, 1)} for row in found]
            print(table(rows[-len(found) :]).splitlines()[-1], file=sys.stderr, flush=True)
    failed = {f"{row['test']} {row['way']}": misses(row) for row in rows if misses(row)}
    return {**machine(), "release": name, "seconds": given.seconds, "rows": rows, "missed": failed}


def main(arguments: list[str] | None = None) -> None:
    """Runs the tests, prints the table; exit code 1 if a target is missed, 2 if they cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--seconds", type=float, default=3.0, help="before and after each harm")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*TESTS], help="some of them")
    parser.add_argument(
        "--ways", type=lambda text: text.split(","), default=["ensemble", "fused"], help="ensemble,fused"
    )
    parser.add_argument("--all", action="store_true", help="one process of each model in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        if unknown := sorted(set(given.only) - set(TESTS)):
            raise InvalidInput(f"--only: there is no {unknown[0]!r}; there are {', '.join(TESTS)}")
        if not given.repository.is_dir():
            raise InvalidInput(
                f"repository {given.repository} does not exist", "peregrine build SHOP --activate"
            )
        with tempfile.TemporaryDirectory(prefix="peregrine-faults-") as folder:
            figures = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, OSError, EOFError) as error:
        parser.exit(2, f"error: {str(error) or 'the process that asks has ended'}\n")
    print(table(figures["rows"]))
    sys.exit(1 if figures["missed"] else 0)


if __name__ == "__main__":
    main()

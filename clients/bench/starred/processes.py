"""Kills and stops the processes of a server, drains it, and asks more of it than it can give."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clients.bench.faults import closed_loop
from clients.bench.starred.load import OVERLOAD_USERS, Bench, Note, Row
from clients.bench.starred.setting import Setting
from clients.client import Client
from clients.errors import BudgetExceeded, Overloaded
from ensemble.server.supervisor import Server

_STOPPED_S, _ALL_TIMES = 5.0, (1, 2, 5, 10)
_IN_FLIGHT, _CAPACITY_S = 16, 3.0


def _model(server: Server) -> str:
    """Names the model that is harmed: the ranker, or the whole pipeline where it is one process."""
    stubs = server.stubs()
    return next((name for name in stubs if name.endswith("_ranker")), next(iter(stubs)))


def _killed(setting: Setting, name: str, count: int, model: str = "") -> Row:
    """Kills processes of a model."""
    server, bench = setting.server, setting.bench
    pids = server.stubs()[model or _model(server)][:count]

    def harm() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    notes, began = bench.run(harm)
    return bench.row(name, notes, began)


def stub(setting: Setting) -> list[Row]:
    """Kills one process of two of a model; with --all of each model in turn."""
    if not setting.is_all:
        return [_killed(setting, "stub", 1)]
    return [_killed(setting, f"stub {model}", 1, model) for model in setting.server.stubs()]


def stubs(setting: Setting) -> list[Row]:
    """Kills all processes of a model."""
    return [_killed(setting, "stubs", 100)]


def server(setting: Setting) -> list[Row]:
    """Kills tritonserver."""
    notes, began = setting.bench.run(lambda: os.kill(setting.server.pid, signal.SIGKILL))
    return [setting.bench.row("server", notes, began)]


def _stopped(bench: Bench, pid: int, name: str) -> list[Row]:
    """Stops a process, and lets it go on if it is still there."""

    def harm() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_STOPPED_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    notes, began = bench.run(harm)
    return [bench.row(name, notes, began)]


def stopped(setting: Setting) -> list[Row]:
    """Stops a process of a model."""
    server = setting.server
    return _stopped(setting.bench, server.stubs()[_model(server)][0], "stopped")


def frozen(setting: Setting) -> list[Row]:
    """Stops tritonserver."""
    return _stopped(setting.bench, setting.server.pid, "frozen")


def drain(setting: Setting) -> list[Row]:
    """Stops one server of two while both are asked."""
    bench = setting.bench
    with setting.second() as other:
        bench.urls = [setting.server.url, other.url]
        notes, began = bench.run(other.stop)
    return [bench.row("drain", notes, began)]


def overload(setting: Setting) -> list[Row]:
    """Asks for ten times what the server can; with --all for as much, twice and five times as well."""
    return [_overload(setting, times) for times in (_ALL_TIMES if setting.is_all else _ALL_TIMES[-1:])]


def _overload(setting: Setting, times: int) -> Row:
    """Asks for so many times what the server can."""
    server, bench = setting.server, setting.bench
    before = _capacity_of_many(server.url, bench.users)
    resident, _ = server.memory_bytes()
    notes, began = bench.run(lambda: None, "overload", rate=times * before)
    after = _capacity_of_many(server.url, bench.users)
    # What others do on the machine changes within seconds: what it can do is measured around the load
    capacity = (before + after) / 2
    refused = [note for note in notes if _is_refused(note)]
    row = bench.row("overload", [note for note in notes if not _is_refused(note)], began)
    waited_ms = [1e3 * (done - due) for due, done, *_ in refused] or [0.0]
    first = min(due for due, *_ in notes)
    asked_s, answered_s = (max(times) - first for times in list(zip(*notes, strict=True))[:2])
    row |= {
        "test": f"overload {times}",
        "times": times,
        "sent": len(notes),
        "rejected": len(refused),
        "capacity_of_many": [round(before, 1), round(after, 1)],
        "goodput": round(row["ok"] / answered_s / capacity, 2),
        "offered": round(len(notes) / asked_s / capacity, 1),
        "reject_p50_ms": round(float(np.percentile(waited_ms, 50)), 1),
        "reject_p99_ms": round(float(np.percentile(waited_ms, 99)), 1),
        "memory_growth": round(server.memory_bytes()[0] / resident - 1, 3),
    }
    back = closed_loop(server.url, bench.users[:20], 4)
    row["back_ms"] = round(max(1e3 * (done - due) for due, done, _ in back), 1)
    row["more"] = f"goodput {row['goodput']} at {row['offered']} times, rejects p99 {row['reject_p99_ms']} ms"
    return row


def _is_refused(note: Note) -> bool:
    """Says whether a call was refused at once, for there were too many."""
    return note[4].startswith(Overloaded.__name__)


def _capacity_of_many(url: str, users: list[str]) -> float:
    """Gives how many calls for several users a closed loop gets a second."""
    with Client(url, fallback=False) as client, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        many = users[:OVERLOAD_USERS]
        list(pool.map(lambda _: client.recommend_many(many, top_k=10), range(_IN_FLIGHT)))
        end, began = time.monotonic() + _CAPACITY_S, time.monotonic()

        def ask() -> int:
            count = 0
            while time.monotonic() < end:
                client.recommend_many(many, top_k=10)
                count += 1
            return count

        count = sum(one.result() for one in [pool.submit(ask) for _ in range(_IN_FLIGHT)])
    return count / (time.monotonic() - began)


def storm(setting: Setting) -> list[Row]:
    """Asks with budgets that hardly anybody can keep."""
    server, bench = setting.server, setting.bench
    first = server.pid
    notes, began = bench.run(lambda: None, "storm")
    row = bench.row("storm", notes, began)
    expected = (BudgetExceeded.__name__, Overloaded.__name__)
    refused = sum(error.startswith(expected) for *_, error in notes)
    row["failed"] -= refused
    row["refused"], row["same_server"] = refused, server.pid == first
    return [row]

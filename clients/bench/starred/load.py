"""Asks servers at Poisson times while harm is done to them; holds each answer against a healthy one."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.aio import AsyncClient
from clients.bench.faults import closed_loop, is_right
from clients.errors import Overloaded
from clients.policy import MAX_IN_FLIGHT
from clients.results import Recommendations
from ensemble.contract import Degraded
from ensemble.errors import PeregrineError
from ensemble.release.release import Release

RECOVERY_S = 5.0
OVERLOAD_USERS = 8  # of a call: it is not who asks that is too slow
_SHARE, _MAX_RATE, _BUDGET_MS = 0.6, 150.0, 1000.0
_OVERLOAD_IN_FLIGHT, _LOST_S, _USERS = 32, 30.0, 150
_ROWS = Degraded.FEATURES_STALE | Degraded.FEATURES_MISSING  # say nothing of the list, which may be healthy
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
                options["users"] = (users[start:] + users[:start])[:OVERLOAD_USERS]
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


def some_users(release: Release) -> list[str]:
    """Draws users of a release to ask for."""
    rows = 1 + np.random.default_rng(0).permutation(len(release.user_ids))[:_USERS]
    return [user.decode() for user in release.user_ids.ids_from_rows(rows)]


@dataclass
class Bench:
    """Holds what is asked of the servers of one test, and what is right: by release and user."""

    seconds: float
    users: list[str]
    urls: list[str] = field(default_factory=list)
    capacity: float = 0.0
    rate: float = 0.0
    healthy: dict[str, dict[str, Recommendations]] = field(default_factory=dict)
    harmed: float = 0.0  # when the last run's harm had been done, and what of it can be repaired was

    def learn(self, url: str) -> None:
        """Notes the healthy lists of the release that is served, and the capacity."""
        closed_loop(url, self.users[:50], 16)
        self.learn_lists(url)
        began = time.monotonic()
        asked = self.users * 2
        closed_loop(url, asked, 16)
        self.capacity = len(asked) / (time.monotonic() - began)
        self.rate = min(_MAX_RATE, _SHARE * self.capacity)

    def learn_lists(self, url: str) -> None:
        """Notes the healthy lists of the release that is served."""
        for *_, one in closed_loop(url, self.users, 16, 30):
            if isinstance(one, Recommendations):
                self.healthy.setdefault(one.release, {})[one.user_id] = one

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
        self.harmed = time.monotonic()
        time.sleep(max(self.seconds, began + self.seconds + RECOVERY_S + 2 - time.monotonic()))
        ours.send("enough")
        notes: list[Note] = ours.recv()
        process.join(10)
        return notes, began

    def row(self, name: str, notes: list[Note], began: float, since: float | None = None) -> Row:
        """Counts what came of a test whose harm began at `began`; `recovery_s` is from `since` on, or from
        there."""
        since = began if since is None else since
        row: Row = {"test": name, "sent": len(notes), "ok": 0, "degraded": 0, "failed": 0, "wrong": 0}
        row |= {"lost": 0, "failures": [], "recovery_s": 0.0}
        for due, done, user, answer, error in notes:
            if answer is None:
                row["lost" if error == "lost" else "failed"] += 1
                row["failures"] = sorted({*row["failures"], error})[:5]
                is_bad = True
            else:
                is_bad, ok = self._judge(user, answer)
                row["degraded"] += is_bad
                row["wrong"] += not ok
                row["ok"] += ok and not is_bad
            if is_bad and due >= began:
                row["recovery_s"] = max(row["recovery_s"], round(done - since, 2))
        for phase in ("before", "during"):
            took = [1e3 * (done - due) for due, done, *_ in notes if (due >= began) == (phase == "during")]
            row[f"p99_ms_{phase}"] = round(float(np.percentile(took or [0], 99)), 1)
        return row

    def _judge(self, user: str, answer: Recommendations) -> tuple[bool, bool]:
        """Says whether an answer is worse than the healthy one of its release and says so, and whether it is
        right."""
        healthy = self.healthy.get(answer.release, {}).get(user)
        if healthy is None:
            return False, False
        extra = answer.degraded & ~healthy.degraded
        is_right_list = is_right(answer, healthy)
        if extra & ~_ROWS:
            return True, bool(answer.items)
        return bool(extra), is_right_list

"""Measures what reading rows costs, for `peregrine features bench`: one request's rows, from each tier.

It counts CPU time of the thread and time on the wall. features reads 1 user and the items of a full history;
recall reads the rows of its candidates. Each line is paced so that the thread is busy 30 % of the time, as a
server is that has room; nothing is read ahead.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput, ServerError
from ensemble.release.release import Release
from ensemble.tiers.connection import connect_now
from ensemble.tiers.load import load_release
from ensemble.tiers.reader import RowReader, RowReaders
from ensemble.tiers.records import item_identities, user_identities
from ensemble.tiers.settings import TierSettings

CANDIDATES, HISTORY = 512, 50
_LOAD = 0.3
# Share of rows that are dropped from L1 before each read.
_MISSED = {"memory": 0.0, "90 % memory, 10 % redis": 0.1, "redis": 1.0}


def measure(release: Release, url: str | None, seconds: float) -> dict[str, Any]:
    """Gives every line's numbers; without `url`, from a redis-server of its own on this machine."""
    if not seconds > 0:
        raise InvalidInput(f"--seconds must be above 0, got {seconds:g}")
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(_own_redis())
            load_release(release, url)
        lines = [
            _line(release, RowReaders(release), "snapshot", what, seconds, 0.0)
            for what in ("features", "recall")
        ]
        # Deadline: far from what is measured, so that a busy machine gives slow lines, not wrong ones
        readers = RowReaders(
            release,
            TierSettings(url, deadline_ms=1000, soft_ttl_s=3600, hard_ttl_s=3600, negative_ttl_s=3600),
        )
        stack.callback(readers.close)
        if not readers.redis or readers.redis.tracker.version is None:
            raise ServerError(
                f"Redis has no rows of release {release.name}", "load them: peregrine features load"
            )
        for what in ("features", "recall"):
            lines += [
                _line(release, readers, tier, what, seconds, missed) for tier, missed in _MISSED.items()
            ]
        causes = dict(readers.redis.causes)
    row_bytes = {"users": release.users.dtype.itemsize, "items": release.items.dtype.itemsize}
    return {
        "release": release.name,
        "shop": release.schema.shop,
        "row_bytes": row_bytes,
        "load": _LOAD,
        "failures": causes,
        "lines": lines,
    }


def _line(
    release: Release, readers: RowReaders, tier: str, what: str, seconds: float, missed: float
) -> dict[str, Any]:
    """Measures one line of the table: reads for `seconds`, then gives quantiles."""
    rng = np.random.default_rng(0)
    read, drop, num_rows = (
        _features(release, readers, rng) if what == "features" else _recall(release, readers, rng)
    )
    cpu: list[int] = []
    wall: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(cpu) < 20:
        if missed:
            drop(missed)
        started, cpu_started = time.perf_counter_ns(), time.thread_time_ns()
        read()
        cpu.append(time.thread_time_ns() - cpu_started)
        wall.append(time.perf_counter_ns() - started)
        time.sleep(min(wall[-1] * 1e-9 * (1 - _LOAD) / _LOAD, 0.05))
    cpu_ms, wall_ms = np.array(cpu[10:]) / 1e6, np.array(wall[10:]) / 1e6  # the first few fill caches
    numbers = {
        f"{name}_{q}_ms": round(float(np.quantile(ms, at)), 4)
        for name, ms in (("cpu", cpu_ms), ("wall", wall_ms))
        for q, at in _QUANTILES
    }
    rates = {
        f"rows_per_{name}": round(num_rows / float(ms.mean()) * 1000)
        for name, ms in (("cpu_s", cpu_ms), ("s", wall_ms))
    }
    return {"step": what, "tier": tier, "rows": num_rows, "reads": len(cpu_ms), **numbers, **rates}


_QUANTILES = (("p50", 0.5), ("p99", 0.99))
Case = tuple[Callable[[], None], Callable[[float], None], int]


def _features(release: Release, readers: RowReaders, rng: np.random.Generator) -> Case:
    """Makes the reads of features: one user and HISTORY items, distinct ones even where pasts are shorter."""
    ids, rows, history = _fixed(release, rng)

    def read() -> None:
        users = readers.users.read_users(ids, rows)
        for name in ("seen", "codes", "values", "features"):
            users.field(name)
        items = readers.items.read_items(history)
        items.field("embedding")
        items.field("features")

    def drop(share: float) -> None:
        if rng.random() < share:
            readers.users.memory.drop(user_identities(ids))
        _drop(readers.items, history, share, rng)

    return read, drop, 1 + history.size


def _recall(release: Release, readers: RowReaders, rng: np.random.Generator) -> Case:
    """Makes the reads of recall: CANDIDATES items' rows."""
    rows = 1 + rng.choice(len(release.item_ids), min(CANDIDATES, len(release.item_ids)), replace=False)[None]

    def read() -> None:
        items = readers.items.read_items(rows)
        items.field("embedding")
        items.field("features")

    return read, lambda share: _drop(readers.items, rows, share, rng), rows.size


def _fixed(release: Release, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Draws a user's id [1] S and row [1], and rows [1, HISTORY] of items."""
    user = 1 + rng.integers(len(release.user_ids), size=1)
    items = 1 + rng.choice(len(release.item_ids), min(HISTORY, len(release.item_ids)), replace=False)
    return release.user_ids.ids_from_rows(user), user, items[None]


def _drop(reader: RowReader, rows: Array, share: float, rng: np.random.Generator) -> None:
    """Drops a share of the items at `rows` from L1."""
    flat = rows.ravel()
    reader.memory.drop(item_identities(flat[rng.permutation(len(flat))[: max(1, round(share * len(flat)))]]))


@contextlib.contextmanager
def _own_redis() -> Iterator[str]:
    """Runs a redis-server on a free port and gives its URL; it is gone afterwards."""
    if not shutil.which("redis-server"):
        raise ServerError(
            "redis-server is not installed",
            "install it, or give --redis URL of one that has the release's rows",
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--dir", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield _when_ready(f"redis://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait()


def _when_ready(url: str) -> str:
    """Gives `url` back as soon as Redis answers there; ServerError after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connect_now(url, 1.0).close()
            return url
        except ServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def print_table(figures: dict[str, Any]) -> None:
    """Prints the numbers on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "step",
        "rows from",
        "rows",
        "CPU p50 ms",
        "CPU p99 ms",
        "wall p50 ms",
        "wall p99 ms",
        "rows / CPU s",
        "rows / s",
        title="one read, 30 % load",
    )
    for line in figures["lines"]:
        times = [f"{line[name]:.3f}" for name in ("cpu_p50_ms", "cpu_p99_ms", "wall_p50_ms", "wall_p99_ms")]
        table.add_row(
            line["step"],
            line["tier"],
            str(line["rows"]),
            *times,
            f"{line['rows_per_cpu_s']:,}",
            f"{line['rows_per_s']:,}",
        )
    Console().print(table)
    if figures["failures"]:
        print(f"calls to Redis without a valid answer: {figures['failures']}")

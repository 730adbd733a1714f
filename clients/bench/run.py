"""The whole measurement, top to bottom: the server and its local twin under the same load in the same run.

lone          one request at a time, against the twin: what Triton, gRPC and five hops add
batches       one request at a time, of 1, 8, … users
closed        more and more requests in flight, until throughput stops growing: saturation
twins         one twin per core at the batch size that Triton formed at saturation
open          Poisson arrivals at shares of saturation, latency from the scheduled time; and twins behind one queue at each rate
perf_analyzer Triton's own closed loop, where its binary is found
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench import perf_analyzer
from clients.bench.loadgen import Load, users_file_of, zipf_users
from clients.bench.queued_twins import measure_queued
from clients.bench.server_probe import ServerProbe, mean_batch, steps_between
from clients.bench.twin import TwinLoad, measure_together
from clients.bench.worker import Worker
from ensemble.errors import InvalidInput, ServerError

RAMP_GAIN = 1.03  # throughput must grow by this factor when concurrency doubles, or it is saturated
MAX_CONCURRENCY = 256
AUTO_SHARES = (0.25, 0.5, 0.75, 0.9)
HALF = 0.5
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; `seconds` is for each row."""

    repository: Path
    url: str | None = None
    seconds: float = 5.0
    rates: Sequence[float] | None = None  # requests a second; None: shares of saturation
    concurrency: Sequence[int] = (1, 4, 16)
    batch_sizes: Sequence[int] = (1, 8, 64)
    zipf: float = 1.1
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    use_perf_analyzer: bool = True

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise InvalidInput(f"--seconds: must be above 0, got {self.seconds}")
        for name, values in (
            ("--rates", self.rates or (1,)),
            ("--concurrency", self.concurrency),
            ("--batch-sizes", self.batch_sizes),
        ):
            if not values or not all(value > 0 for value in values):
                raise InvalidInput(f"{name}: numbers above 0, separated by commas, got {list(values)}")


class Bench:
    """One server, its release, and the measurements of both."""

    def __init__(self, options: BenchOptions, say: Callable[[str], None]) -> None:
        from ensemble.release.release import open_release
        from ensemble.server.running import running_server

        self.options, self.say = options, say
        server = running_server(options.repository) if options.repository.is_dir() else None
        if server is None:
            raise ServerError(
                f"no server is at work on {options.repository}; start one: peregrine serve --repository "
                f"{options.repository}"
            )
        if options.url not in (None, server.url):
            raise InvalidInput(
                f"--url {options.url}: {options.repository} is served at {server.url}; bench measures a "
                "server together with its release"
            )
        self.url, self.headers = server.url, server.headers
        self.probe = ServerProbe(self.url, self.headers, server.pid)
        self.server_version = self.probe.version()
        self.release = open_release(options.repository, self._served_release())
        self.steps = self._served_steps()

    def _served_release(self) -> str:
        """The release that answers, which the server knows best."""
        from clients.client import Client

        with Client(self.url) as client:
            return client.recommend("").release

    def _served_steps(self) -> list[str]:
        """Names of the steps that answer: the pipeline's, or the pipeline's own where it is served fused."""
        served = self.probe.snapshot().models
        steps = [model.name for model in self.release.pipeline.models]
        return (
            steps
            if f"{self.release.name}_{steps[0]}" in served or not served
            else [self.release.pipeline.name]
        )

    def _load(self, **changes: Any) -> Load:
        o = self.options
        common = {"seconds": o.seconds, "zipf": o.zipf, "seed": o.seed, "parameters": o.parameters}
        return Load(**{"url": self.url, "users_file": users_file_of(self.release.path), **common, **changes})

    def triton(self, **changes: Any) -> Row:
        """One row: the load generator's view, and what the server did meanwhile."""
        load = self._load(**changes)
        worker = Worker("clients.bench.loadgen", load.to_spec())
        before = self.probe.snapshot()
        worker.go()
        row = worker.result()
        after = self.probe.snapshot()
        steps = steps_between(before, after, self.release.name, self.steps)
        answered = row["sent"] - row["failed"] + row["failures"].get("UNSENT", 0)
        row.update(
            batch_size=load.batch_size,
            steps=steps,
            mean_batch=mean_batch(steps),
            users_per_s=row["achieved_per_s"] * load.batch_size,
        )
        row["generator_cpu_ms"] = row.pop("generator_cpu_s") * 1000 / max(1, row["sent"])
        if before.cpu_s is not None and after.cpu_s is not None:
            row["cpu_ms"] = (after.cpu_s - before.cpu_s) * 1000 / max(1, answered)
        return {**({"rate": load.rate} if load.rate else {"concurrency": load.concurrency}), **row}

    def _twin_load(self, batch_size: int) -> TwinLoad:
        o = self.options
        return TwinLoad(
            str(o.repository), self.release.name, o.seconds, batch_size, o.zipf, o.seed, o.parameters
        )

    def twin(self, batch_size: int, processes: int = 1) -> Row:
        return measure_together(self._twin_load(batch_size), processes)

    def queued_twins(self, rate: float) -> Row:
        return measure_queued(self._twin_load(1), rate, os.cpu_count() or 1)

    def lone(self) -> Row:
        """One request at a time, and the twin, twice by turns: the machine's other work then falls on
        both."""
        self.say("lone requests, Triton and twin by turns")
        pairs = [(self.triton(concurrency=1), self.twin(1)) for _ in range(2)]
        ours, twins = (
            min((a for a, _ in pairs), key=lambda r: r["p50_ms"]),
            min((b for _, b in pairs), key=lambda r: r["p50_ms"]),
        )
        added_ms = ours["p50_ms"] - twins["p50_ms"]
        return {
            "triton": ours,
            "twin": twins,
            "added_ms": added_ms,
            "ratio": ours["p50_ms"] / twins["p50_ms"],
            "hop_ms": added_ms / len(self.steps),
        }

    def batches(self) -> list[Row]:
        rows = []
        for size in self.options.batch_sizes:
            self.say(f"one request at a time, {size} users each")
            rows.append(
                {
                    "batch_size": size,
                    "triton": self.triton(concurrency=1, batch_size=size),
                    "twin": self.twin(size),
                }
            )
        return rows

    def closed(self) -> list[Row]:
        """The asked-for concurrencies, then twice the last one until throughput grows no more."""
        rows: list[Row] = []
        for concurrency in self.options.concurrency:
            self.say(f"closed loop, {concurrency} in flight")
            rows.append(self.triton(concurrency=concurrency))
        misses = 0  # one row that grows too little may be the machine's other work; two are saturation
        while rows[-1]["concurrency"] < MAX_CONCURRENCY and misses < 2:
            best = max(row["achieved_per_s"] for row in rows)
            self.say(f"closed loop, {rows[-1]['concurrency'] * 2} in flight")
            rows.append(self.triton(concurrency=rows[-1]["concurrency"] * 2))
            misses = 0 if rows[-1]["achieved_per_s"] >= best * RAMP_GAIN else misses + 1
        return rows

    def twins_at(self, batch: float) -> Row:
        """One twin per core at a mean batch size that may lie between two whole ones: cost per user is linear
        in 1 / batch."""
        processes = os.cpu_count() or 1
        low, high = max(1, math.floor(batch)), max(1, math.ceil(batch))
        self.say(f"{processes} twins at once, {low}–{high} users a batch")
        first = self.twin(low, processes)
        if low == high:
            return {**first, "batch_size": batch}
        second = self.twin(high, processes)
        share = (1 / low - 1 / batch) / (1 / low - 1 / high)
        mixed = {
            key: first[key] + share * (second[key] - first[key])
            for key in ("cpu_ms_per_user", "p50_ms", "p99_ms")
        }
        users_per_s = 1 / (
            1 / first["users_per_s"] + share * (1 / second["users_per_s"] - 1 / first["users_per_s"])
        )
        return {"batch_size": batch, "processes": processes, "users_per_s": users_per_s, **mixed}

    def open(self, saturation: float) -> list[Row]:
        rows = []
        rates = self.options.rates or [round(saturation * share, 1) for share in AUTO_SHARES]
        for rate in rates:
            self.say(f"open loop, {rate:g} requests a second")
            rows.append(
                {**self.triton(rate=rate), "share": rate / saturation, "twins": self.queued_twins(rate)}
            )
        return rows

    def perf_analyzer(self) -> list[Row] | None:
        found = perf_analyzer.find() if self.options.use_perf_analyzer else None
        if found is None:
            return None
        users = np.load(users_file_of(self.release.path), mmap_mode="r", allow_pickle=False)
        drawn = zipf_users(users, 2000, self.options.zipf, np.random.default_rng(self.options.seed))
        rows = []
        for concurrency in self.options.concurrency:
            self.say(f"perf_analyzer, {concurrency} in flight")
            ids = [user.decode() for user in drawn.tolist()]
            sweep = perf_analyzer.Sweep(
                self.url, self.headers, ids, concurrency, self.options.seconds, 1, self.options.parameters
            )
            before = self.probe.snapshot()
            row = perf_analyzer.measure(found, sweep)
            rows.append(
                {**row, "steps": steps_between(before, self.probe.snapshot(), self.release.name, self.steps)}
            )
        return rows


def run(options: BenchOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything; the result is plain JSON."""
    from clients.bench.report import machine

    bench, started = Bench(options, say), time.perf_counter()
    report: dict[str, Any] = {**machine(), "release": _facts(bench), "options": _plain(options)}
    report["lone"], report["batches"], report["closed"] = bench.lone(), bench.batches(), bench.closed()
    best = max(report["closed"], key=lambda row: row["achieved_per_s"])
    twins = bench.twins_at(best["mean_batch"])
    report["saturation"] = _saturation(best, twins)
    report["open"] = bench.open(best["achieved_per_s"])
    report["half"] = _half(report["open"], report["lone"])
    report["perf_analyzer"] = bench.perf_analyzer()
    report["server_rss_bytes"] = bench.probe.memory_bytes()
    report["duration_s"] = time.perf_counter() - started
    return report


def _saturation(best: Row, twins: Row) -> Row:
    """Triton at its best closed loop against one twin per core at the same mean batch."""
    result = {
        "concurrency": best["concurrency"],
        "achieved_per_s": best["achieved_per_s"],
        "mean_batch": best["mean_batch"],
        "twins": twins,
        "throughput_ratio": best["achieved_per_s"] / twins["users_per_s"],
    }
    if "cpu_ms" in best:
        result.update(cpu_ms=best["cpu_ms"], added_cpu_ms=best["cpu_ms"] - twins["cpu_ms_per_user"])
    return result


def _half(rows: list[Row], lone: Row) -> Row | None:
    """p99 at half of saturation (the nearest open-loop row between .4 and .6), against a lone request's p50
    and queued twins' p99."""
    near = [row for row in rows if abs(row["share"] - HALF) <= 0.1]
    if not near:
        return None
    row = min(near, key=lambda r: abs(r["share"] - HALF))
    p99_ms, twins_p99_ms = row["p99_ms"], row["twins"]["p99_ms"]
    ratios = {"ratio": p99_ms / lone["triton"]["p50_ms"], "twins_ratio": p99_ms / twins_p99_ms}
    return {
        "rate": row["rate"],
        "share": row["share"],
        "p99_ms": p99_ms,
        "twins_p99_ms": twins_p99_ms,
        **ratios,
    }


def _facts(bench: Bench) -> Row:
    sizes = bench.release.schema.sizes
    return {
        "name": bench.release.name,
        "shop": bench.release.schema.shop,
        "users": len(bench.release.user_ids),
        "items": len(bench.release.item_ids),
        "candidates": sizes.candidates,
        "steps": bench.steps,
        "tritonserver": bench.server_version,
    }


def _plain(options: BenchOptions) -> Row:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}

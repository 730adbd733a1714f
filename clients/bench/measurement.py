"""Measures, top to bottom, a server and its local twin under the same load in the same run.

lone          one request at a time, against the twin: what Triton, gRPC and five hops add
batches       one request at a time, of 1, 8, … users
closed        more and more requests in flight, until throughput stops growing: saturation
twins         one twin a core at the batch size that Triton formed at saturation
open          Poisson arrivals at shares of saturation, latency from the scheduled time; and twins behind one
              queue at each rate
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
from clients.bench.local_twin import TwinLoad, measure_together
from clients.bench.machine import machine
from clients.bench.measuring_process import MeasuringProcess
from clients.bench.queued_twins import measure_queued
from clients.bench.server_probe import ServerProbe, mean_batch, steps_between
from ensemble.errors import InvalidInput, ServerError

RAMP_GAIN = 1.03  # throughput must grow by this factor when concurrency doubles, or it is saturated
MAX_CONCURRENCY = 256
AUTO_SHARES = (0.25, 0.5, 0.75, 0.9)
HALF = 0.5
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchOptions:
    """Says what to measure; `seconds` is for each row."""

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
    """Measures one server and its release; `say` is told what is being measured."""

    def __init__(self, options: BenchOptions, say: Callable[[str], None]) -> None:
        from ensemble.release.release import open_release
        from ensemble.server.running import running_servers

        self.options, self.say = options, say
        servers = running_servers(options.repository) if options.repository.is_dir() else []
        if not servers:
            raise ServerError(
                f"no server is at work on {options.repository}",
                f"start one: peregrine serve --repository {options.repository}",
            )
        server = next((one for one in servers if options.url in (None, one.url)), None)
        if server is None:
            at = ", ".join(one.url for one in servers)
            raise InvalidInput(
                f"--url {options.url}: {options.repository} is served at {at}",
                "bench measures a server together with its release; name that server's repository",
            )
        self.url, self.headers = server.url, server.headers
        self.probe = ServerProbe(self.url, self.headers, server.pid)
        self.server_version = self.probe.version()
        self.release = open_release(options.repository, self._served_release())
        self.steps = self._served_steps()

    def _served_release(self) -> str:
        """Asks the server which release answers: nobody knows it better."""
        from clients.client import Client

        with Client(self.url) as client:
            return client.recommend("").release

    def _served_steps(self) -> list[str]:
        """Names the steps that answer: the pipeline's, or the pipeline itself where it is served fused."""
        served = self.probe.snapshot().models
        steps = [model.name for model in self.release.pipeline.models]
        is_fused = served and f"{self.release.name}_{steps[0]}" not in served
        return [self.release.pipeline.name] if is_fused else steps

    def _load(self, **changes: Any) -> Load:
        """Gives the load that the options ask for, with `changes`."""
        o = self.options
        common = {"seconds": o.seconds, "zipf": o.zipf, "seed": o.seed, "parameters": o.parameters}
        return Load(**{"url": self.url, "users_file": users_file_of(self.release.path), **common, **changes})

    def triton(self, **changes: Any) -> Row:
        """Measures the server under one load: what the load generator saw, and what the server did."""
        load = self._load(**changes)
        process = MeasuringProcess("clients.bench.loadgen", load.to_spec())
        process.ready()
        before = self.probe.snapshot()
        process.go()
        row = process.result()
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
        """Measures so many twins at once, each with batches of `batch_size` users."""
        return measure_together(self._twin_load(batch_size), processes)

    def queued_twins(self, rate: float) -> Row:
        """Measures one twin a core behind one queue at `rate` requests a second."""
        return measure_queued(self._twin_load(1), rate, os.cpu_count() or 1)

    def lone(self) -> Row:
        """Measures one request at a time, and the twin, twice by turns, so that other work on the machine
        falls on both."""
        self.say("lone requests, Triton and twin by turns")
        pairs = [(self.triton(concurrency=1), self.twin(1)) for _ in range(2)]
        triton, twin = (min(rows, key=lambda row: row["p50_ms"]) for rows in zip(*pairs, strict=True))
        added_ms = triton["p50_ms"] - twin["p50_ms"]
        return {
            "triton": triton,
            "twin": twin,
            "added_ms": added_ms,
            "ratio": triton["p50_ms"] / twin["p50_ms"],
            "hop_ms": added_ms / len(self.steps),
        }

    def batches(self) -> list[Row]:
        """Measures one request of several users at a time, and the twin with the same batches."""
        rows = []
        for size in self.options.batch_sizes:
            self.say(f"one request at a time, {size} users each")
            triton = self.triton(concurrency=1, batch_size=size)
            rows.append({"batch_size": size, "triton": triton, "twin": self.twin(size)})
        return rows

    def closed(self) -> list[Row]:
        """Measures the options' concurrencies, then twice the last one until throughput grows no more."""
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
        """Measures one twin a core at a mean batch size, which may lie between two whole ones.

        Then both of them are measured and mixed: cost per user is linear in 1 / batch.
        """
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
        """Measures open loops at the options' rates, or at shares of `saturation` (requests a second)."""
        rows = []
        rates = self.options.rates or [round(saturation * share, 1) for share in AUTO_SHARES]
        for rate in rates:
            self.say(f"open loop, {rate:g} requests a second")
            row, twins = self.triton(rate=rate), self.queued_twins(rate)
            rows.append({**row, "share": rate / saturation, "twins": twins})
        return rows

    def perf_analyzer(self) -> list[Row] | None:
        """Runs perf_analyzer at the options' concurrencies; None where it is not found or not wanted."""
        tool = perf_analyzer.find() if self.options.use_perf_analyzer else None
        if tool is None:
            return None
        users = np.load(users_file_of(self.release.path), mmap_mode="r", allow_pickle=False)
        drawn = zipf_users(users, 2000, self.options.zipf, np.random.default_rng(self.options.seed))
        ids, rows = [user.decode() for user in drawn.tolist()], []
        for concurrency in self.options.concurrency:
            self.say(f"perf_analyzer, {concurrency} in flight")
            sweep = perf_analyzer.Sweep(
                self.url, self.headers, ids, concurrency, self.options.seconds, 1, self.options.parameters
            )
            before = self.probe.snapshot()
            row = perf_analyzer.measure(tool, sweep)
            after = self.probe.snapshot()
            rows.append({**row, "steps": steps_between(before, after, self.release.name, self.steps)})
        return rows


def measure(options: BenchOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures everything; gives figures in JSON's types, which clients.bench.report shows."""
    bench, started = Bench(options, say), time.perf_counter()
    figures: dict[str, Any] = {**machine(), "release": _facts(bench), "options": _plain(options)}
    figures["lone"], figures["batches"], figures["closed"] = bench.lone(), bench.batches(), bench.closed()
    best = max(figures["closed"], key=lambda row: row["achieved_per_s"])
    figures["saturation"] = _saturation(best, bench.twins_at(best["mean_batch"]))
    figures["open"] = bench.open(best["achieved_per_s"])
    figures["half"] = _half(figures["open"], figures["lone"])
    figures["perf_analyzer"] = bench.perf_analyzer()
    figures["server_rss_bytes"] = bench.probe.memory_bytes()
    figures["duration_s"] = time.perf_counter() - started
    return figures


def _saturation(best: Row, twins: Row) -> Row:
    """Compares Triton at its best closed loop with one twin a core at the same mean batch."""
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
    """Compares p99 at half of saturation with a lone request's p50 and queued twins' p99.

    The row is the open loop nearest to half, between .4 and .6; None where there is none.
    """
    near = [row for row in rows if abs(row["share"] - HALF) <= 0.1]
    if not near:
        return None
    row = min(near, key=lambda row: abs(row["share"] - HALF))
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
    """Says what release was measured, on which server."""
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
    """Writes the options in JSON's types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}

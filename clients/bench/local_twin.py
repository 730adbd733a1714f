"""Measures the local twin under the same load: ensemble.local in a process of one thread, no server."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.loadgen import latency_summary, users_file_of, zipf_users
from clients.bench.measuring_process import Measure, measure_at_once, serve_measurement
from ensemble.arrays import Array

_DISTINCT = 4000  # users that are drawn beforehand and asked for in turn


@dataclass(frozen=True)
class TwinLoad:
    """Says what is asked of the twin: batches of `batch_size` users, one after another."""

    repository: str
    release: str
    seconds: float
    batch_size: int = 1
    zipf: float = 1.1
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)


class _Timed:
    """Runs a step and notes the time it takes."""

    def __init__(self, step: Any, spent_s: dict[str, float], name: str) -> None:
        self._step, self._spent_s, self._name = step, spent_s, name

    def run(self, *args: Any, **tensors: Array) -> Any:
        began = time.perf_counter()
        result = self._step.run(*args, **tensors)
        self._spent_s[self._name] += time.perf_counter() - began
        return result


def open_twin(load: TwinLoad) -> tuple[Any, list[list[bytes]]]:
    """Opens the pipeline and warms it; gives it with batches of users to ask it for."""
    from ensemble.local import LocalPipeline
    from ensemble.steps.served import open_served

    release = open_served(Path(load.repository), load.release)
    pipeline: Any = LocalPipeline(release)
    users = np.load(users_file_of(release.path), mmap_mode="r", allow_pickle=False)
    rng = np.random.default_rng(load.seed)
    drawn = zipf_users(users, max(_DISTINCT, load.batch_size * 200), load.zipf, rng)
    whole = len(drawn) // load.batch_size * load.batch_size
    batches = drawn[:whole].reshape(-1, load.batch_size).tolist()
    for batch in batches[-5:]:
        pipeline.recommend(batch, load.parameters)
    return pipeline, batches


def prepare(spec: dict[str, Any]) -> Measure:
    """Makes the measurement of a TwinLoad, given as a dict; the pipeline is warm."""
    load = TwinLoad(**spec)
    pipeline, batches = open_twin(load)
    spent_s: dict[str, float] = defaultdict(float)
    pipeline.steps = {name: _Timed(step, spent_s, name) for name, step in pipeline.steps.items()}
    return lambda: _measure(load, pipeline, batches, spent_s)


def _measure(
    load: TwinLoad, pipeline: Any, batches: list[list[bytes]], spent_s: dict[str, float]
) -> dict[str, Any]:
    """Asks for one batch after another for `load.seconds`; gives latencies, throughput and CPU."""
    latencies: list[float] = []
    cpu, start = time.process_time(), time.perf_counter()
    while time.perf_counter() - start < load.seconds:
        began = time.perf_counter()
        pipeline.recommend(batches[len(latencies) % len(batches)], load.parameters)
        latencies.append((time.perf_counter() - began) * 1000)
    elapsed, num_users = time.perf_counter() - start, len(latencies) * load.batch_size
    return {
        "batch_size": load.batch_size,
        "users_per_s": num_users / elapsed,
        "cpu_ms_per_user": (time.process_time() - cpu) * 1000 / num_users,
        "steps_ms": {name: spent * 1000 / len(latencies) for name, spent in spent_s.items()},
        **latency_summary(np.array(latencies)),
    }


def measure_together(load: TwinLoad, processes: int) -> dict[str, Any]:
    """Measures so many twins at once: their throughputs add up; the rest is averaged."""
    specs = [{**asdict(load), "seed": load.seed + number} for number in range(processes)]
    rows = measure_at_once("clients.bench.local_twin", specs)
    averaged = [key for key in rows[0] if key.endswith("_ms") and key != "steps_ms"]
    return {
        **{key: _mean(row[key] for row in rows) for key in averaged},
        "batch_size": load.batch_size,
        "processes": processes,
        "users_per_s": sum(row["users_per_s"] for row in rows),
        "cpu_ms_per_user": _mean(row["cpu_ms_per_user"] for row in rows),
        "steps_ms": {name: _mean(row["steps_ms"][name] for row in rows) for name in rows[0]["steps_ms"]},
    }


def _mean(values: Iterable[float]) -> float:
    """Averages numbers."""
    return float(np.mean(list(values)))


if __name__ == "__main__":
    serve_measurement(prepare)

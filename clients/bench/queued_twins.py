"""Measures twins behind one queue: how long arrivals of a rate would wait if serving cost nothing.

One twin a core; whichever is free takes all that wait, up to the release's max_batch. No gRPC, no Triton, no
generator: what is left of a latency is computing and waiting for computing, the floor under any server of
these models on this machine (an M/D/c queue with batch service).
"""

from __future__ import annotations

import fcntl
import mmap
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.loadgen import latency_summary, poisson_times
from clients.bench.local_twin import TwinLoad, open_twin
from clients.bench.measuring_process import Measure, measure_at_once, serve_measurement
from ensemble.arrays import Array

_STATE = struct.Struct("dq")  # time of the start (0: nobody has come yet), number of the next arrival
_LEAD_S = 0.2  # from the first twin's coming to the start, so that all are there


class Queue:
    """Holds arrivals [R] that several processes take from; its state is a file, so that they need no parent
    in common."""

    def __init__(self, path: Path, arrivals: Array) -> None:
        """Opens the queue; `arrivals` are seconds from the start, ascending, the same in every process."""
        self.arrivals = arrivals
        self._file = path.open("r+b")
        self._state = mmap.mmap(self._file.fileno(), _STATE.size)

    def take(self, most: int) -> Array:
        """Waits for the next arrival, and takes what has come by then.

        Gives the arrivals' times [1..most] on perf_counter's clock; [0] at the end. A twin waits in the lock,
        so that idle ones stand in line, too.
        """
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            start, number = _STATE.unpack_from(self._state)
            start = start or time.perf_counter() + _LEAD_S
            if number < len(self.arrivals):
                time.sleep(max(0.0, start + self.arrivals[number] - time.perf_counter()))
            arrived = int(np.searchsorted(self.arrivals, time.perf_counter() - start, side="right"))
            taken = self.arrivals[number : min(max(arrived, number + 1), number + most)]
            _STATE.pack_into(self._state, 0, start, number + len(taken))
            return start + taken
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def serve(queue: Queue, answer: Callable[[int], Any], most: int) -> tuple[Array, int]:
    """Answers until the queue ends; gives latencies [R'] in ms from the arrival, and how many batches."""
    latencies: list[Array] = []
    while len(times := queue.take(most)):
        answer(len(times))
        latencies.append((time.perf_counter() - times) * 1000)
    return np.concatenate([np.zeros(0), *latencies]), len(latencies)


def prepare(spec: dict[str, Any]) -> Measure:
    """Makes the measurement of one of the twins from {load: TwinLoad, rate, queue: file}; it is warm."""
    load, rate = TwinLoad(**spec["load"]), float(spec["rate"])
    pipeline, batches = open_twin(load)
    users = [user for batch in batches for user in batch]
    arrivals = poisson_times(rate, load.seconds, np.random.default_rng(load.seed))
    taken = 0

    def answer(count: int) -> None:
        nonlocal taken
        pipeline.recommend([users[(taken + place) % len(users)] for place in range(count)], load.parameters)
        taken += count

    def measure() -> dict[str, Any]:
        latencies, batches = serve(
            Queue(Path(spec["queue"]), arrivals), answer, pipeline.release.schema.sizes.max_batch
        )
        return {"latencies_ms": latencies.tolist(), "batches": batches}

    return measure


def measure_queued(load: TwinLoad, rate: float, processes: int) -> dict[str, Any]:
    """Measures so many twins under `rate` requests of one user a second, for load.seconds."""
    with tempfile.NamedTemporaryFile(prefix="peregrine-queue-") as file:
        file.write(bytes(_STATE.size))
        file.flush()
        spec = {"load": asdict(load), "rate": rate, "queue": file.name}
        results = measure_at_once("clients.bench.queued_twins", [spec] * processes)
    latencies = np.concatenate([result["latencies_ms"] for result in results])
    batches = sum(result["batches"] for result in results)
    return {
        "rate": rate,
        "processes": processes,
        "mean_batch": len(latencies) / max(1, batches),
        **latency_summary(latencies),
    }


if __name__ == "__main__":
    serve_measurement(prepare)

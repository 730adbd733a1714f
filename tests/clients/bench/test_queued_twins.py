"""Twins behind one queue: every arrival is taken once, by whoever is free, and latency counts from the
arrival."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clients.bench.local_twin import TwinLoad
from clients.bench.queued_twins import _STATE, Queue, measure_queued, serve
from ensemble.release.release import Release


@pytest.fixture
def queue_file(tmp_path: Path) -> Path:
    path = tmp_path / "queue"
    path.write_bytes(bytes(_STATE.size))
    return path


def test_what_comes_during_an_answer_is_taken_together_and_has_waited(queue_file: Path) -> None:
    batches: list[int] = []

    def answer(count: int) -> None:
        batches.append(count)
        time.sleep(0.1)

    latencies, _ = serve(Queue(queue_file, np.array([0.0, 0.02, 0.04, 0.06, 0.5])), answer, most=2)
    assert batches == [1, 2, 1, 1]
    assert (latencies >= [100, 180, 160, 240, 100]).all()
    assert latencies[-1] < 180  # who comes to an idle twin does not wait


_TWIN = """
import json, sys, time
import numpy as np
from pathlib import Path
from clients.bench.queued_twins import Queue, serve
latencies, batches = serve(Queue(Path(sys.argv[1]), np.arange(40) * 0.02), lambda count: time.sleep(0.03), 64)
print(json.dumps([len(latencies), batches]))
"""


def test_two_processes_share_the_arrivals(queue_file: Path) -> None:
    twins = [
        subprocess.Popen([sys.executable, "-c", _TWIN, str(queue_file)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    taken = [json.loads(twin.communicate(timeout=60)[0])[0] for twin in twins]
    assert sum(taken) == 40
    assert min(taken) >= 5


def test_twins_of_a_release_answer_behind_a_queue(tiny_repository: Path, tiny_release: Release) -> None:
    row = measure_queued(TwinLoad(str(tiny_repository), tiny_release.name, 0.5), 40.0, 2)
    assert row["processes"] == 2
    assert row["mean_batch"] >= 1
    assert 0 < row["p50_ms"] <= row["p99_ms"]

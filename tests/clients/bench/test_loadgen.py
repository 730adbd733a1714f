"""The load generator, against a small gRPC server whose speed is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import FakeTriton

from clients.bench.loadgen import (
    Generator,
    Load,
    _closed_loop,
    _open_loop,
    latency_summary,
    poisson_times,
    prepare,
    zipf_users,
)
from clients.bench.measuring_process import measure_in_process
from ensemble.errors import PeregrineError


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    server = FakeTriton()
    yield server
    server.stop()


@pytest.fixture
def users_file(tmp_path: Path) -> str:
    np.save(tmp_path / "user_ids.npy", np.array([f"u{number:04d}".encode() for number in range(1000)]))
    return str(tmp_path / "user_ids.npy")


def measure(triton: FakeTriton, users_file: str, **options: Any) -> dict[str, Any]:
    return prepare(
        Load(
            **{"url": triton.url, "users_file": users_file, "seconds": 1.0, "warmup_s": 0.1, **options}
        ).to_spec()
    )()


def test_poisson_times_have_the_asked_rate_and_spread() -> None:
    times = poisson_times(1000, 20, np.random.default_rng(0))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert times[-1] < 20


def test_zipf_users_come_as_unequally_as_asked() -> None:
    users = np.array([f"u{number}".encode() for number in range(1000)])
    drawn = zipf_users(users, 50_000, 1.1, np.random.default_rng(0))
    counts = np.sort(np.unique(drawn, return_counts=True)[1])[::-1]
    assert counts[0] / counts[9] == pytest.approx(10**1.1, rel=0.15)
    even = np.unique(zipf_users(users, 50_000, 0.0, np.random.default_rng(0)), return_counts=True)[1]
    assert even.max() < 100


def test_latency_summary_of_nothing_is_zero() -> None:
    assert set(latency_summary(np.zeros(0)).values()) == {0.0}
    assert latency_summary(np.arange(1001.0))["p999_ms"] == pytest.approx(999)


def test_open_loop_offers_what_was_asked_and_sends_real_users(triton: FakeTriton, users_file: str) -> None:
    result = measure(triton, users_file, rate=100.0, batch_size=2, parameters={"top_k": 3})
    assert result["offered_per_s"] == pytest.approx(100, rel=0.35)
    assert (result["failed"], result["failures"]) == (0, {})
    sent = triton.requests[-1]
    assert list(sent.inputs[0].shape) == [2, 1]
    assert sent.raw_input_contents[0][4:5] == b"u"
    assert sent.parameters["top_k"].int64_param == 3


@pytest.mark.alone
def test_open_loop_charges_a_stall_to_everyone_who_had_to_wait(triton: FakeTriton, users_file: str) -> None:
    """One worker that needs 20 ms serves 50 a second; at 100 a second the last of one second wait about a
    second."""
    slow = FakeTriton(workers=1)
    slow.delay_s = 0.02
    load = Load(slow.url, users_file, 1.0, rate=100.0)
    generator = Generator(load)
    result = _open_loop(generator)
    closed = _closed_loop(Generator(Load(slow.url, users_file, 1.0)), 0.5)
    slow.stop()
    assert result["failed"] == 0
    assert result["achieved_per_s"] < 0.7 * result["offered_per_s"]
    assert result["p99_ms"] > 500
    assert closed["p99_ms"] < 100  # what a closed loop would have called its latency


@pytest.mark.alone
def test_open_loop_says_when_it_could_not_send(triton: FakeTriton, users_file: str) -> None:
    triton.delay_s = 0.3
    result = _open_loop(Generator(Load(triton.url, users_file, 0.5, rate=400.0, max_in_flight=10)))
    assert not result["kept_up"]
    assert result["failures"]["UNSENT"] == result["failed"] > 0


@pytest.mark.alone
def test_closed_loop_keeps_the_asked_number_in_flight(triton: FakeTriton, users_file: str) -> None:
    triton.delay_s = 0.05
    result = measure(triton, users_file, concurrency=4)
    assert result["achieved_per_s"] == pytest.approx(4 / 0.05, rel=0.3)
    assert result["p50_ms"] == pytest.approx(52, abs=20)


def test_failures_are_counted_by_status_and_not_as_latencies(triton: FakeTriton, users_file: str) -> None:
    generator = Generator(Load(triton.url, users_file, 0.5))
    triton.failures = [("INVALID_ARGUMENT", "top_k: no")] * 3
    result = _closed_loop(generator, 0.3)
    assert (result["failed"], result["failures"]) == (3, {"INVALID_ARGUMENT": 3})


def test_an_ok_without_items_is_a_failure(triton: FakeTriton, users_file: str) -> None:
    triton.is_empty = True
    result = _closed_loop(Generator(Load(triton.url, users_file, 0.5)), 0.3)
    assert result["failures"]["EMPTY"] == result["failed"] > 0


def test_it_runs_in_a_process_of_its_own_and_reports_its_cpu(triton: FakeTriton, users_file: str) -> None:
    started = time.perf_counter()
    result = measure_in_process(
        "clients.bench.loadgen", Load(triton.url, users_file, 0.3, rate=50.0, warmup_s=0.1).to_spec()
    )
    assert 0 < result["generator_cpu_s"] < time.perf_counter() - started
    assert result["failed"] == 0


def test_a_measurement_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        PeregrineError, match=r"clients\.bench\.local_twin could not start: .*no release 'r1'"
    ):
        measure_in_process(
            "clients.bench.local_twin", {"repository": str(tmp_path), "release": "r1", "seconds": 1.0}
        )

"""Asks a server: for real users drawn by Zipf, at Poisson times (open loop) or one after another (closed).

Open loop: requests leave when the schedule says so, whether or not earlier ones were answered, and latency
counts from the scheduled time. A server that stalls is charged for everybody who had to wait (no coordinated
omission). What the generator itself could not send in time is reported as lag.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.measuring_process import Measure, serve_measurement
from clients.wire import Call, decode_bytes
from ensemble.arrays import Array
from ensemble.contract import PIPELINE, SEARCH

PERCENTILES = {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "p999_ms": 99.9}
MAX_LAG_MS = 5.0  # at p99; above it the generator, not the server, is what was measured
_DISTINCT = 4000  # requests that are encoded beforehand and sent in turn
_SEARCHES = 400  # of which each may hold a picture
_CHECK_EVERY = 20  # answers between two that are read, not only counted
_DRAIN_S = 120.0
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Load:
    """Says what is asked of the server. `rate` (requests a second) makes it an open loop, `concurrency` a
    closed one."""

    url: str
    users_file: str  # .npy [U] S, the ids that users are drawn from
    seconds: float
    rate: float | None = None
    concurrency: int = 1
    batch_size: int = 1  # users in a request
    zipf: float = 1.1  # exponent; 0 = all users alike
    seed: int = 0
    warmup_s: float = 0.5
    max_in_flight: int = 4000
    parameters: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)  # searched for in turn, by one user a request
    pictures: list[str] = field(default_factory=list)  # files that are searched for, beside them or alone

    def to_spec(self) -> dict[str, Any]:
        """Gives the load as a dict that JSON can hold."""
        return asdict(self)


def zipf_users(users: Array, count: int, exponent: float, rng: np.random.Generator) -> Array:
    """Draws `count` ids out of users [U] S. The i-th most active user has weight i ** -exponent; who that is
    is drawn too."""
    weights = np.arange(1, len(users) + 1, dtype=np.float64) ** -exponent
    cumulated = np.cumsum(weights)
    ranks = np.searchsorted(cumulated, rng.random(count) * cumulated[-1])
    return np.asarray(users)[rng.permutation(len(users))[np.minimum(ranks, len(users) - 1)]]


def poisson_times(rate: float, seconds: float, rng: np.random.Generator) -> Array:
    """Draws arrival times [R] float64: seconds from the start, all below `seconds`."""
    gaps = rng.exponential(1 / rate, int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 20))
    times = np.cumsum(gaps)
    return times[times < seconds]


def latency_summary(latencies_ms: Array) -> dict[str, float]:
    """Gives p50 … p99.9 and the mean of latencies [R] in ms; all are 0 when nothing was answered."""
    if not len(latencies_ms):
        return {**dict.fromkeys(PERCENTILES, 0.0), "mean_ms": 0.0}
    values = np.percentile(latencies_ms, list(PERCENTILES.values()))
    return {
        **{name: float(value) for name, value in zip(PERCENTILES, values, strict=True)},
        "mean_ms": float(latencies_ms.mean()),
    }


class Generator:
    """Sends encoded requests over one channel; notes when each was answered."""

    def __init__(self, load: Load) -> None:
        import grpc

        self.load, self.rng = load, np.random.default_rng(load.seed)
        self._payloads = encoded_requests(load, self.rng)
        limits = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(load.url, options=limits)
        self._infer = self._channel.unary_unary(_METHOD)
        self._running: dict[int, Any] = {}
        self.answers: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self.failures: Counter[str] = Counter()

    def send(self, number: int) -> None:
        """Starts request `number`; `answers` will have (number, time of the answer), -1 for a failure."""
        rpc = self._infer.future(self._payloads[number % len(self._payloads)])
        self._running[number] = rpc  # gRPC cancels a call that is garbage
        rpc.add_done_callback(partial(self._note, number))

    def _note(self, number: int, rpc: Any) -> None:
        """Notes that a request has ended, in gRPC's thread; an OK without items is a failure."""
        at, status = time.perf_counter(), rpc.code().name
        self._running.pop(number, None)
        if status == "OK" and number % _CHECK_EVERY == 0 and not has_items(rpc.result()):
            status = "EMPTY"
        if status != "OK":
            self.failures[status] += 1
        self.answers.put((number, at if status == "OK" else -1.0))

    @property
    def num_in_flight(self) -> int:
        """Counts the requests that are not answered yet."""
        return len(self._running)

    def warm_up(self) -> None:
        """Opens the connection and lets the server meet what is coming."""
        _closed_loop(self, self.load.warmup_s)
        self.failures.clear()

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()


def encoded_requests(load: Load, rng: np.random.Generator) -> list[bytes]:
    """Encodes requests beforehand, so that the generator's own work per request is small."""
    from clients.transport import proto_from_call

    users = np.load(load.users_file, mmap_mode="r", allow_pickle=False)
    if load.texts or load.pictures:
        return _encoded_searches(load, zipf_users(users, _SEARCHES, load.zipf, rng).tolist())
    drawn = zipf_users(users, _DISTINCT * load.batch_size, load.zipf, rng).reshape(-1, load.batch_size)
    calls = (Call(tuple(ids), load.parameters) for ids in drawn.tolist())
    return [proto_from_call(call, PIPELINE).SerializeToString() for call in calls]


def _encoded_searches(load: Load, users: list[bytes]) -> list[bytes]:
    """Encodes searches for the texts and pictures in turn, one for each of the users."""
    from clients.search import call_of_search
    from clients.transport import proto_from_call

    texts = load.texts or [""]
    pictures: list[str | None] = [*load.pictures] or [None]
    asked = []
    for at, user in enumerate(users):
        text, picture = texts[at % len(texts)], pictures[at % len(pictures)]
        call = call_of_search(user.decode(), text, picture, load.parameters, None)
        asked.append(proto_from_call(call, SEARCH).SerializeToString())
    return asked


def has_items(raw: bytes) -> bool:
    """Tells whether every user of an answer got at least one item: a server can say OK and mean nothing."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(raw)
    for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.name == "item_ids" and tensor.shape[0] and tensor.shape[1]:
            return all(decode_bytes(content, tensor.shape[0] * tensor.shape[1])[:: tensor.shape[1]])
    return False


def _open_loop(generator: Generator) -> dict[str, Any]:
    """Sends at Poisson times whatever is answered; latencies count from when a request was due."""
    load = generator.load
    assert load.rate is not None
    due = poisson_times(load.rate, load.seconds, generator.rng)
    start = time.perf_counter() + 0.05
    lag_ms, unsent = _send_all(generator, start, due)
    finished = _drain(generator, len(due) - unsent)
    answered = np.array([number for number, at in finished if at > 0], np.int64)
    times = np.array([at for _, at in finished if at > 0])
    end = max(float(times.max(initial=0.0)) - start, load.seconds)
    lag_p99_ms = float(np.percentile(lag_ms, 99)) if len(due) else 0.0
    return {
        "offered_per_s": len(due) / load.seconds,
        "achieved_per_s": len(answered) / end,
        "sent": len(due) - unsent,
        "failed": len(due) - len(answered),
        "failures": {**generator.failures, **({"UNSENT": unsent} if unsent else {})},
        "lag_p99_ms": lag_p99_ms,
        "kept_up": lag_p99_ms <= MAX_LAG_MS and not unsent,
        **latency_summary((times - start - due[answered]) * 1000),
    }


def _send_all(generator: Generator, start: float, due: Array) -> tuple[Array, int]:
    """Sends a request at each of the times due [R]; gives how late each was [R] in ms, and how many could not
    be sent because too many were in flight."""
    lag_ms, unsent = np.zeros(len(due)), 0
    for number, offset in enumerate(due.tolist()):
        wait_s = start + offset - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        if generator.num_in_flight >= generator.load.max_in_flight:
            unsent += 1
            continue
        lag_ms[number] = (time.perf_counter() - start - offset) * 1000
        generator.send(number)
    return lag_ms, unsent


def _drain(generator: Generator, count: int) -> list[tuple[int, float]]:
    """Waits for what is in flight, since nothing is ever cancelled; gives (number, time of its answer)."""
    finished: list[tuple[int, float]] = []
    until = time.perf_counter() + _DRAIN_S
    while len(finished) < count and time.perf_counter() < until:
        try:
            finished.append(generator.answers.get(timeout=1.0))
        except queue.Empty:
            continue
    return finished


def _closed_loop(generator: Generator, seconds: float) -> dict[str, Any]:
    """Keeps `concurrency` requests in flight. One thread sends, so that latency is not the generator's own
    contention."""
    start = time.perf_counter()
    sent_at: dict[int, float] = {}
    for number in range(generator.load.concurrency):
        sent_at[number] = time.perf_counter()
        generator.send(number)
    number, latencies, failed = generator.load.concurrency, [], 0
    until = start + seconds
    while sent_at:
        done, at = generator.answers.get(timeout=_DRAIN_S)
        began = sent_at.pop(done)
        if at < 0:
            failed += 1
        elif at <= until:
            latencies.append((at - began) * 1000)
        now = time.perf_counter()
        if now < until:
            sent_at[number] = now
            generator.send(number)
            number += 1
    return {
        "achieved_per_s": len(latencies) / seconds,
        "sent": number,
        "failed": failed,
        "failures": dict(generator.failures),
        **latency_summary(np.array(latencies)),
    }


def prepare(spec: dict[str, Any]) -> Measure:
    """Makes the measurement of a Load, given as a dict; it is connected and warm."""
    generator = Generator(Load(**spec))
    generator.warm_up()

    def measure() -> dict[str, Any]:
        cpu = time.process_time()
        load = generator.load
        result = _open_loop(generator) if load.rate else _closed_loop(generator, load.seconds)
        result["generator_cpu_s"] = time.process_time() - cpu
        generator.close()
        return result

    return measure


def users_file_of(folder: Path) -> str:
    """Names the file of a release's own user ids."""
    return str(folder / "user_ids.npy")


if __name__ == "__main__":
    serve_measurement(prepare)

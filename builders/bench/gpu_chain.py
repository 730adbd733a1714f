"""Runs the whole pipeline on the GPU: in one process beside the CPU's (part `twin`), then on Triton."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from builders.bench.gpu_rows import Row, guarded, wall_ms
from builders.compile.stage import compile_release, toolchain
from clients.bench.loadgen import Load, users_file_of
from clients.bench.measuring_process import measure_at_once
from ensemble.arrays import Array, Tensors
from ensemble.engines import CPU, ENGINE_VARIABLE, GPU, INDEX_VARIABLE, ONNXRUNTIME, ONNXRUNTIME_GPU
from ensemble.engines.flavors import FLAVORS, TITLES
from ensemble.engines.onnx import CUDA
from ensemble.engines.plans import find_plans
from ensemble.engines.tensorrt import this_node
from ensemble.errors import PeregrineError, ServerError
from ensemble.local import LocalPipeline
from ensemble.server.running import RunningServer, running_server
from ensemble.steps.served import ServedRelease, open_served

_USERS, _BATCH = 512, 64
# Places of a list that may hold another item than the CPU's: near ties fall otherwise in another precision.
_MOST_MOVED = 0.05
_CLIENTS, _SECONDS = 6, 2.0
_IN_FLIGHT = (1, 240)  # of all clients together
_SHARES, _RATES = (0.5, 0.8), (5_000.0, 10_000.0)


def compile_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `compile`: plans of this release for this card, as `peregrine compile` builds them."""
    tools = toolchain()
    title = TITLES[tools.node.flavor]
    for one in compile_release(release.repository, release.name, tools):
        note = "was there" if one.reused else f"built in {one.duration_s:.1f} s"
        note += f", {one.size_bytes / 1e6:.2f} MB"
        yield Row("compile", one.model, title, one.precision, error=one.relative_error, note=note)


def twin_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `twin`: one process on the CPU, and one on the GPU, asked for the same users."""
    users = _some_users(release)
    ways = {"CPU": (ONNXRUNTIME, CPU)}
    if not cpu:
        ways |= {f"GPU, {name}": (name, GPU) for name in _gpu_engines(release)}
    wanted: list[Tensors] = []
    for name, (engine, index) in ways.items():
        yield from guarded("twin", name, partial(_one_twin, release, name, engine, index, users, wanted))


def _one_twin(
    release: ServedRelease, name: str, engine: str, index: str, users: list[bytes], wanted: list[Tensors]
) -> Iterator[Row]:
    """Rows of one twin; the CPU's lists are wanted of the others."""
    with _environment({ENGINE_VARIABLE: engine, INDEX_VARIABLE: index}):
        twin = LocalPipeline(open_served(release.repository, release.name))
    batches = [users[start : start + _BATCH] for start in range(0, len(users), _BATCH)]
    lists = [twin.recommend(batch, _wishes(release, len(batch))) for batch in batches]
    error = tolerance = None
    if name == "CPU":
        wanted[:] = lists
    elif wanted:  # empty where the CPU's twin failed: nothing to hold these lists against
        same = [(a["item_ids"] == b["item_ids"]).mean() for a, b in zip(lists, wanted, strict=True)]
        error, tolerance = 1 - float(np.mean(same)), _MOST_MOVED
    for size in (1, _BATCH):
        ms = wall_ms(lambda size=size: twin.recommend(users[:size]), 1.0)  # type: ignore[misc]
        yield Row("twin", "recommend", name, "", size, ms, error, tolerance, rate=size / ms * 1e3)


def _some_users(release: ServedRelease) -> list[bytes]:
    """Chooses users of the whole shop, and a few that it does not know."""
    rows = np.linspace(1, len(release.user_ids), _USERS - 16).astype(np.int64)
    known: Array = release.user_ids.ids_from_rows(rows)
    return [*known.tolist(), *(f"nobody-{i}".encode() for i in range(16))]


def _wishes(release: ServedRelease, num_users: int) -> list[dict[str, Any]]:
    """Gives each user's options by turns: none, one value of a category alone, all but one."""
    if not release.vocabularies.get("items"):
        return [{}] * num_users
    name, values = next(iter(release.vocabularies["items"].items()))
    wishes: list[dict[str, Any]] = [{}, {"allow": {name: values[:1]}}, {"deny": {name: values[1:2]}}]
    return [wishes[user % len(wishes)] for user in range(num_users)]


def _gpu_engines(release: ServedRelease) -> Iterator[str]:
    """Names what engines can run on here, the best first."""
    for flavor in FLAVORS:
        with contextlib.suppress(PeregrineError):
            find_plans(release, this_node(flavor))
            yield flavor
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        yield ONNXRUNTIME_GPU


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def triton_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `triton`: `peregrine serve`, fused and as the ensemble, asked by several clients."""
    cores = os.cpu_count() or 2
    engine = ONNXRUNTIME if cpu else next(iter(_gpu_engines(release)), ONNXRUNTIME)
    index = CPU if engine == ONNXRUNTIME else GPU
    ways = {
        "fused": ["--fused", "--instances", str(max(2, cores * 5 // 8))],
        "ensemble": ["--instances", str(max(2, cores // 4))],
    }
    for name, flags in ways.items():
        flags = [*flags, "--require", engine, "--index", index]
        yield from guarded("triton", name, partial(_served_rows, release, f"{name}, {engine}", flags))


def _served_rows(release: ServedRelease, what: str, flags: list[str]) -> Iterator[Row]:
    started = time.monotonic()
    with _server(release, flags) as server:
        yield Row("triton", what, "start", note=f"ready after {time.monotonic() - started:.1f} s")
        best = 0.0
        for in_flight in _IN_FLIGHT:
            figures = _measure(release, server, concurrency=max(1, in_flight // _CLIENTS))
            best = max(best, figures["achieved_per_s"])
            yield _load_row(what, f"closed loop, {in_flight} in flight", figures)
        for rate in [*(round(share * best) for share in _SHARES), *(r for r in _RATES if r < 1.1 * best)]:
            figures = _measure(release, server, rate=rate / _CLIENTS)
            yield _load_row(what, f"open loop, {rate:,.0f} requests/s offered", figures)


def _load_row(what: str, runtime: str, figures: dict[str, Any]) -> Row:
    note = f"p99 {figures['p99_ms']:.2f} ms; {figures['failed']} failed"
    note += "" if figures["kept_up"] else "; THE CLIENTS DID NOT KEEP UP"
    return Row("triton", what, runtime, "", 1, figures["p50_ms"], rate=figures["achieved_per_s"], note=note)


def _measure(release: ServedRelease, server: RunningServer, **load: Any) -> dict[str, Any]:
    """Asks from several processes at once; p50 is their mean, p99 that of the worst."""
    clients = 1 if load.get("concurrency") == 1 else _CLIENTS
    common = {"url": server.url, "users_file": users_file_of(release.path), "seconds": _SECONDS}
    specs = [Load(**{**common, **load, "seed": seed}).to_spec() for seed in range(clients)]
    figures = measure_at_once("clients.bench.loadgen", specs)
    return {
        "achieved_per_s": sum(one["achieved_per_s"] for one in figures),
        "failed": sum(one["failed"] for one in figures),
        "p50_ms": float(np.mean([one["p50_ms"] for one in figures])),
        "p99_ms": max(one["p99_ms"] for one in figures),
        "kept_up": all(one.get("kept_up", True) for one in figures),
    }


@contextlib.contextmanager
def _server(release: ServedRelease, flags: list[str]) -> Iterator[RunningServer]:
    """Serves as a user does, and stops; ServerError with the log's last lines if it does not start."""
    command = [sys.executable, "-m", "peregrine", "serve", "--repository", str(release.repository)]
    command += ["--as-root"]  # a check of one's own machine
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--metrics-port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("serving release"):
                log.seek(0)
                raise ServerError(
                    " | ".join(log.read().strip().splitlines()[-6:]) or "the server did not start"
                )
            server = running_server(release.repository)
            assert server is not None
            yield server
        finally:
            process.terminate()
            process.wait(60)

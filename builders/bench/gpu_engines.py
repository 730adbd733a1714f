"""Holds every engine in every precision and runtime against onnxruntime on the CPU: gpu-check's first part.

All get the same real feeds.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builders.compile.files import write_plan
from builders.compile.graph import precision, read_model, use_every_input
from builders.compile.stage import TOLERANCES, Request, Toolchain, engine_key, relative_error, timing_cache
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import PRECISIONS, choices, quantize
from ensemble.arrays import Tensors
from ensemble.engines import open_engine
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import TYPED_ONNX, ranges
from ensemble.errors import PeregrineError
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease

BATCHES = (1, 8, 64, 256)
# of one H200: bf16 matrix work and memory traffic a second, as measured on it
PEAK_FLOPS, PEAK_BYTES = (
    790e12,
    4.3e12,
)
_REPEATS, _COPIED_BATCH = 50, 64
Feeds = Tensors


@dataclass(frozen=True)
class Row:
    """Holds one line of the check's table; `ms` and `error` are None where there is nothing to say."""

    part: str  # engine, faiss, chain
    what: str
    runtime: str
    precision: str = ""
    batch: int = 0
    ms: float | None = None
    error: float | None = None  # relative to the largest output, or the share of neighbours that differ
    tolerance: float | None = None
    roofline: float | None = None  # share of what the GPU could do: 1 = at its peak
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Numbers off by more than their precision may be (NaN included)."""
        return self.error is not None and self.tolerance is not None and not self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """Holds one engine of the release with feeds for the largest batch."""

    release: ServedRelease
    model: ModelSpec
    feeds: Feeds

    @property
    def path(self) -> Path:
        """Names the model that the CPU runs."""
        return self.release.member_file(self.model.name, "model.onnx")

    @cached_property
    def wanted(self) -> Feeds:
        """Gives what onnxruntime answers on the CPU in fp32: the truth of all rows."""
        return OnnxEngine(self.path, 1).run(self.feeds)

    def part(self, batch: int) -> Feeds:
        """Feeds for `batch` users, taken again from the first when there are not so many."""
        return {
            name: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))
            for name, array in self.feeds.items()
        }

    def error(self, found: Feeds) -> float:
        """Gives the largest relative error of an answer on all the feeds."""
        return max(
            relative_error(found[tensor.name], self.wanted[tensor.name]) for tensor in self.model.outputs
        )

    @cached_property
    def work(self) -> tuple[float, float, float]:
        """Counts (FLOPs a user, bytes a user, bytes a call): matrix products; inputs and outputs; weights.

        Activations stay on the chip.
        """
        flops = _matrix_flops(self.path.read_bytes(), self.part(1))
        ends = sum(array.nbytes for array in (*self.feeds.values(), *self.wanted.values())) / len(
            next(iter(self.feeds.values()))
        )
        return flops, ends, float(self.path.stat().st_size)

    def roofline(self, batch: int, ms: float, bytes_share: float) -> float:
        """Gives the share of the GPU's peak: the least time its work needs, over the time taken.

        The work is its arithmetic or its memory, whichever takes longer.
        """
        flops, ends, weights = self.work
        least_s = max(flops * batch / PEAK_FLOPS, (ends * batch + weights * bytes_share) / PEAK_BYTES)
        return least_s / (ms / 1e3)


def engine_rows(case: Case, tools: Toolchain | None, why_not: str) -> Iterator[Row]:
    """Gives all rows of one engine but torch's; a runtime that is not there says so in its row."""
    yield from _timed(case, "onnxruntime CPU", "fp32", OnnxEngine(case.path, 1).run, TOLERANCES["fp32"])
    for name, data in variants(case):
        yield from _typed_rows(case, name, data, tools, why_not)
    yield from _or_why(
        "engine",
        case.model.name,
        "onnxruntime GPU",
        lambda: _timed(
            case, "onnxruntime GPU", "fp32", open_engine(case.path, gpu=True).run, TOLERANCES["fp32"]
        ),
    )


def variants(case: Case) -> Iterator[tuple[str, bytes]]:
    """Gives (name, ONNX) for fp32, fp16, fp8 and int8, and the release's own typed model where it has one.

    Every block that can be has that precision, the rest fp32.
    """
    data = case.path.read_bytes()
    blocks, measured = graph.blocks(graph.load(data)), calibrate(data, case.feeds, min_users=1)
    for kind in reversed(PRECISIONS["tensorrt"]):
        chosen = {block.name: kind for block in blocks if kind in choices(block, "tensorrt")}
        yield kind, data if kind == "fp32" else quantize(data, chosen, measured, "tensorrt")
    typed = case.path.with_name(TYPED_ONNX)
    if typed.exists():
        yield "release", typed.read_bytes()


def _typed_rows(case: Case, name: str, data: bytes, tools: Toolchain | None, why_not: str) -> Iterator[Row]:
    types = precision(read_model(data, name))
    tolerance = max(TOLERANCES[kind] for kind in types.split("+"))
    if (
        name != "fp32"
    ):  # what TensorRT is asked to compute, computed by the CPU: the error that is not TensorRT's
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(data)
            answer = OnnxEngine(path, 1, fuse=types == "fp32").run(case.feeds)
        yield Row(
            "engine",
            case.model.name,
            "onnxruntime CPU, typed",
            types,
            len(next(iter(case.feeds.values()))),
            None,
            case.error(answer),
            tolerance,
            note=name,
        )
    if tools is None:
        yield Row("engine", case.model.name, "TensorRT", types, note=why_not)
        return
    yield from _or_why(
        "engine", case.model.name, "TensorRT", lambda: _plan_rows(case, name, data, tools, tolerance)
    )


def _plan_rows(case: Case, name: str, data: bytes, tools: Toolchain, tolerance: float) -> Iterator[Row]:
    model = read_model(data, name)
    key = engine_key(data, model, ranges(case.model, max(BATCHES)), tools.node, portable=False)
    use_every_input(model)
    started = time.monotonic()
    plan = tools.build(
        Request(
            model.SerializeToString(),
            key.profile,
            key.sparse,
            False,
            timing_cache(case.release.repository, tools.node),
        )
    )
    built = f"{name}; built in {time.monotonic() - started:.1f} s, {len(plan) / 1e6:.1f} MB"
    with tempfile.TemporaryDirectory() as folder:
        facts = {"model": case.model.name, "member": case.model.name, "key": dataclasses.asdict(key)}
        engine: Any = tools.open(
            write_plan(Path(folder) / "plan", case.release, case.model, plan, case.feeds, facts)
        )
    error = case.error(engine.run(case.feeds))
    share = len(data) / case.path.stat().st_size
    for batch in BATCHES:
        ms = statistics.median(engine.time_ms(case.part(batch), _REPEATS))
        yield Row(
            "engine",
            case.model.name,
            "TensorRT",
            key.precision,
            batch,
            ms,
            error,
            tolerance,
            case.roofline(batch, ms, share),
            built,
        )
    part = case.part(_COPIED_BATCH)
    for runtime, run in (
        ("TensorRT, copies included", engine.run),
        ("TensorRT, answer stays on the GPU", engine.run_on_gpu),
    ):
        yield Row(
            "engine",
            case.model.name,
            runtime,
            key.precision,
            _COPIED_BATCH,
            wall_ms(partial(run, part)),
            note=f"{name}; wall clock",
        )


def _timed(
    case: Case, runtime: str, types: str, run: Callable[[Feeds], Feeds], tolerance: float
) -> Iterator[Row]:
    """Rows of a runtime that is timed by the clock on the wall, copies included."""
    error = case.error(run(case.feeds))
    for batch in BATCHES:
        part = case.part(batch)
        yield Row(
            "engine", case.model.name, runtime, types, batch, wall_ms(partial(run, part)), error, tolerance
        )


def wall_ms(call: Callable[[], Any], at_most_s: float = 1.0) -> float:
    """Gives a call's median milliseconds, after one to warm up.

    It is the median of as many calls as fit `at_most_s`, of three at least.
    """
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_most_s and len(times) < _REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def _or_why(part: str, what: str, runtime: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Gives the rows, or one that says why there are none."""
    try:
        yield from rows()
    except PeregrineError as error:
        yield Row(part, what, runtime, note=error.fact.rpartition(": ")[2])


def _matrix_flops(data: bytes, feeds: Feeds) -> float:
    """Multiplications and additions of every MatMul and Gemm on one user's feeds: their shapes are read off a
    run."""
    model = onnx.load_from_string(data)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    seen = (
        {name for node in products for name in (*node.input[:2], node.output[0])}
        - set(weights)
        - {value.name for value in model.graph.output}
    )
    inner = seen - {value.name for value in model.graph.input}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(inner))
    run = OnnxEngine(model.SerializeToString()).run
    shapes = weights | {name: array.shape for name, array in {**feeds, **run(feeds)}.items()}
    transposed = {node.name: any(a.name == "transA" and a.i for a in node.attribute) for node in products}
    return float(
        sum(
            2 * np.prod(shapes[n.output[0]]) * shapes[n.input[0]][0 if transposed[n.name] else -1]
            for n in products
        )
    )

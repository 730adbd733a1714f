"""Holds every engine in every precision and runtime against onnxruntime on the CPU: gpu-check's engine parts.

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

from builders.bench.gpu_roofline import Peak, measure_peak
from builders.bench.gpu_rows import Row, first_line, guarded, wall_ms
from builders.compile.files import write_plan
from builders.compile.graph import precision, read_model, use_every_input
from builders.compile.samples import real_feeds
from builders.compile.stage import (
    TOLERANCES,
    Request,
    Toolchain,
    engine_key,
    engine_models,
    relative_error,
    timing_cache,
    toolchain,
)
from builders.compress import graph
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.quantize import choices, quantize
from ensemble.arrays import Tensors
from ensemble.engines.flavors import FLAVORS, TITLES
from ensemble.engines.onnx import CUDA, OnnxEngine
from ensemble.engines.onnx_cuda import CudaOnnxEngine
from ensemble.engines.plans import TYPED_ONNX, ranges
from ensemble.errors import PeregrineError
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease

BATCHES = (1, 8, 64, 256)
_KINDS = ("fp16", "fp32", "int8", "fp8")  # in the order of interest: a part may run out of time
_FIRST = ("ranker", "user_encoder", "item_encoder")
_FEEDS = 64  # users with a past whose feeds every runtime gets
_REPEATS, _COPIED_BATCH = 50, 64


@dataclass(frozen=True)
class Case:
    """Holds one engine of the release with feeds for the largest batch."""

    release: ServedRelease
    model: ModelSpec
    feeds: Tensors

    @property
    def path(self) -> Path:
        """Names the model that the CPU runs."""
        return self.release.member_file(self.model.name, "model.onnx")

    @property
    def typed(self) -> Path | None:
        """Names the model that TensorRT is given, where compression wrote one of its own."""
        path = self.path.with_name(TYPED_ONNX)
        return path if path.exists() else None

    @cached_property
    def source(self) -> bytes:
        """Gives the ONNX that plans come from: of a compressed release its typed one, since the CPU's has
        8-bit forms of its own."""
        return (self.typed or self.path).read_bytes()

    @cached_property
    def wanted(self) -> Tensors:
        """Gives what onnxruntime answers on the CPU: the truth of all rows."""
        return OnnxEngine(self.source, 4, fuse=self.typed is None).run(self.feeds)

    def part(self, batch: int) -> Tensors:
        """Feeds for `batch` users, taken again from the first when there are not so many."""
        return {
            name: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:])))
            for name, array in self.feeds.items()
        }

    def error(self, found: Tensors) -> float:
        """Gives the largest relative error of an answer on all the feeds."""
        return max(
            relative_error(found[tensor.name], self.wanted[tensor.name]) for tensor in self.model.outputs
        )

    @cached_property
    def work(self) -> tuple[float, float]:
        """Counts (FLOPs a user, bytes a user): matrix products; inputs and outputs.

        Activations stay on the chip.
        """
        flops = _matrix_flops(self.source, self.part(1))
        ends = sum(array.nbytes for array in (*self.feeds.values(), *self.wanted.values()))
        return flops, ends / len(next(iter(self.feeds.values())))

    def roofline(self, peak: Peak | None, batch: int, ms: float, weights: int) -> float | None:
        """Gives the share of the card's peak that a call took, with so many bytes of weights."""
        flops, ends = self.work
        return peak.share(flops * batch, ends * batch + weights, ms) if peak else None


def cases(release: ServedRelease) -> list[Case]:
    """Gives the release's engines, the ranker first, each with the feeds of real users."""
    models = engine_models(release)
    feeds = real_feeds(release, models, users=_FEEDS)
    order = {name: place for place, name in enumerate(_FIRST)}
    models.sort(key=lambda model: order.get(model.name, len(order)))
    return [Case(release, model, feeds[model.name]) for model in models]


def engine_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `engines`: plans of every precision, built and run here, and onnxruntime on the CPU."""
    tools = {flavor: _tools(flavor) for flavor in FLAVORS}
    for flavor, (_, why_not) in tools.items():
        opens = f"opens no plan here: {why_not}" if why_not else "may open plans here"
        yield Row("engines", "the card", TITLES[flavor], note=opens)
    try:
        peak: Peak | None = measure_peak()
        assert peak
        yield Row(
            "engines",
            "the card",
            "peak",
            note=f"{peak.flops / 1e12:.0f} TFLOP/s fp16, {peak.bytes / 1e12:.2f} TB/s copied",
        )
    except PeregrineError as error:
        peak = None
        yield Row("engines", "the card", "peak", note=str(error))
    for case in cases(release):
        for name, write in variants(case).items():
            yield from guarded(
                "engines", case.model.name, partial(_typed_rows, case, name, write, tools, peak)
            )
    for case in cases(release):
        run = OnnxEngine(case.path, 1).run
        yield from _timed(case, "engines", "onnxruntime CPU, one thread", "", run, None, None)


def onnxruntime_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `onnxruntime`: its CUDA provider, copies included."""
    for case in cases(release):
        for name in {"fp16", "fp32", "release"} & set(variants(case)):
            yield from guarded("onnxruntime", case.model.name, partial(_cuda_rows, case, name))


def _cuda_rows(case: Case, name: str) -> Iterator[Row]:
    """Rows of one precision; 8-bit graphs are left out: CUDA runs them node by node, as they are written."""
    data = variants(case)[name]()
    types = precision(read_model(data, name))
    for title, engine in (("node by node", OnnxEngine(data, 1, CUDA)), ("as a graph", CudaOnnxEngine(data))):
        runtime = f"onnxruntime CUDA, {title}"
        yield from _timed(case, "onnxruntime", runtime, types, engine.run, _tolerance(types), None)


Tools = dict[str, tuple[Toolchain | None, str]]  # {flavour: (what builds and opens, why there is none)}


def _tools(flavor: str) -> tuple[Toolchain | None, str]:
    try:
        return toolchain(flavor), ""
    except PeregrineError as error:
        return None, error.fact


def _tolerance(types: str) -> float:
    return max(TOLERANCES[kind] for kind in types.split("+"))


def variants(case: Case) -> dict[str, Callable[[], bytes]]:
    """Gives {name: what writes the ONNX} of fp16, fp32, int8 and fp8; of a compressed release its own alone.

    Every block that can be has that precision, the rest fp32.
    """
    if case.typed:
        return {"release": lambda: case.source}
    return {kind: partial(_variant, case, kind) for kind in _KINDS}


def _variant(case: Case, kind: str) -> bytes:
    data = case.source
    if kind == "fp32":
        return data
    blocks, measured = graph.blocks(graph.load(data)), calibrate(data, case.feeds, min_users=1)
    chosen = {block.name: kind for block in blocks if kind in choices(block, "tensorrt")}
    return quantize(data, chosen, measured, "tensorrt")


def _typed_rows(
    case: Case,
    name: str,
    write: Callable[[], bytes],
    tools: Tools,
    peak: Peak | None,
) -> Iterator[Row]:
    data = write()
    types = precision(read_model(data, name))
    if name not in ("fp32", "release"):
        # What TensorRT is asked to compute, computed by the CPU: the error that is not TensorRT's.
        answer = OnnxEngine(data, 4, fuse=False).run(case.feeds)
        yield Row(
            "engines",
            case.model.name,
            "onnxruntime CPU, typed",
            types,
            len(next(iter(case.feeds.values()))),
            error=case.error(answer),
            tolerance=_tolerance(types),
            note=name,
        )
    for flavor, (built_by, _) in tools.items():
        if built_by is None:
            continue  # said once, at the top
        try:
            yield from _plan_rows(case, name, data, built_by, peak)
        except Exception as error:  # the other precisions go on, whatever this one's builder throws
            note = f"{name}: {first_line(error)}"
            yield Row("engines", case.model.name, TITLES[flavor], types, note=note)


def _plan_rows(case: Case, name: str, data: bytes, tools: Toolchain, peak: Peak | None) -> Iterator[Row]:
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
    error, title = case.error(engine.run(case.feeds)), TITLES[tools.node.flavor]
    for batch in BATCHES:
        ms = statistics.median(engine.time_ms(case.part(batch), _REPEATS))
        yield Row(
            "engines",
            case.model.name,
            title,
            key.precision,
            batch,
            ms,
            error,
            _tolerance(key.precision),
            case.roofline(peak, batch, ms, len(data)),
            note=built,
        )
    part = case.part(_COPIED_BATCH)
    for runtime, run in (
        (f"{title}, copies included", engine.run),
        (f"{title}, answer stays on the GPU", engine.run_on_gpu),
    ):
        yield Row(
            "engines",
            case.model.name,
            runtime,
            key.precision,
            _COPIED_BATCH,
            wall_ms(partial(run, part)),
            note=f"{name}; wall clock",
        )


def _timed(
    case: Case,
    part: str,
    runtime: str,
    types: str,
    run: Callable[[Tensors], Tensors],
    tolerance: float | None,
    error: float | None,
) -> Iterator[Row]:
    """Rows of a runtime that is timed by the clock on the wall, copies included."""
    if tolerance is not None:
        error = case.error(run(case.feeds))
    for batch in BATCHES:
        ms = wall_ms(partial(run, case.part(batch)))
        yield Row(part, case.model.name, runtime, types, batch, ms, error, tolerance)


def _matrix_flops(data: bytes, feeds: Tensors) -> float:
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

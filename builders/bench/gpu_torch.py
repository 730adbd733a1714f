"""Times the modules that the release was exported from, eager and compiled: gpu-check's torch rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.bench.gpu_engines import BATCHES, Case, cases
from builders.bench.gpu_roofline import Peak, measure_peak
from builders.bench.gpu_rows import Row, first_line, wall_ms
from builders.compile.stage import TOLERANCES
from builders.encoders.checkpoint import read_encoders
from builders.encoders.models import ItemRows
from builders.presets import preset
from builders.ranker.checkpoint import read_ranker
from ensemble.arrays import Tensors
from ensemble.errors import PeregrineError
from ensemble.steps.served import ServedRelease

_EVENTS = 50


def torch_rows(release: ServedRelease, cpu: bool) -> Iterator[Row]:
    """Gives the part `torch`: eager in fp32 and fp16, and torch.compile, on the GPU where there is one."""
    try:
        peak: Peak | None = measure_peak()
    except PeregrineError:
        peak = None
    for case in cases(release):
        yield from _case_rows(case, peak)


def _case_rows(case: Case, peak: Peak | None) -> Iterator[Row]:
    module = find_module(case)
    if module is None:
        yield Row(
            "torch",
            case.model.name,
            "torch",
            note="no checkpoint beside this release gives its numbers: build it in this repository",
        )
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device).eval()
    for name, call, halves, batches in _ways(module, device):
        for half in halves:
            try:
                yield from _rows(case, f"{name} {device.upper()}", call, device, half, peak, batches)
            except Exception as error:  # torch.compile fails with whatever its compilers raise
                yield Row("torch", case.model.name, name, note=first_line(error))


def _ways(module: nn.Module, device: str) -> Iterator[tuple[str, Any, tuple[bool, ...], tuple[int, ...]]]:
    """Gives (name, what to call, in half precision or not, batches); each batch is compiled anew."""
    if device == "cpu":
        yield "torch eager", module, (False,), BATCHES
        return
    yield "torch eager", module, (True, False), BATCHES
    yield "torch.compile", torch.compile(module, dynamic=False), (True,), (64, 1, 256)
    graphs = torch.compile(module, dynamic=False, mode="reduce-overhead")
    yield "torch.compile with CUDA graphs", graphs, (True,), (64, 1)


def find_module(case: Case) -> nn.Module | None:
    """Finds the build's checkpoint whose outputs are the release's, among those kept beside it."""
    for module in _candidates(case):
        found = _answer(case, module, _placed(case.feeds, "cpu"))
        if case.error(found) < 1e-3:
            return module
    return None


def _candidates(case: Case) -> Iterator[nn.Module]:
    schema, build = case.release.schema, case.release.repository / ".build"
    encoders, rankers = sorted(build.glob("*/encoders-*")), sorted(build.glob("*/ranker-*"))
    known = preset(str(case.release.manifest.get("preset", "base")))
    for folder in encoders:
        if case.model.name == "user_encoder":
            yield read_encoders(folder).user_encoder()
    for folder in rankers if case.model.name != "user_encoder" else ():
        trained = read_ranker(folder, schema, known.ranker.model)
        if case.model.name == "ranker":
            yield trained.ranker
            continue
        for other in encoders:
            yield ItemRows(read_encoders(other).item_encoder(), trained.item_head, schema.sizes.embedding)


def _placed(feeds: Tensors, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in feeds.items()}


def _answer(case: Case, module: Any, tensors: dict[str, torch.Tensor]) -> Tensors:
    with torch.inference_mode():
        out = module(**tensors)
    out = out if isinstance(out, tuple) else (out,)
    return {
        spec.name: tensor.float().cpu().numpy() for spec, tensor in zip(case.model.outputs, out, strict=True)
    }


def _rows(
    case: Case,
    runtime: str,
    module: Any,
    device: str,
    half: bool,
    peak: Peak | None,
    batches: tuple[int, ...],
) -> Iterator[Row]:
    """Times half precision by autocast: what a user of torch would do first."""
    types = "fp16+fp32" if half else "fp32"
    with torch.autocast(device, torch.float16, enabled=half):
        error = case.error(_answer(case, module, _placed(case.feeds, device)))
        for batch in batches:
            ms = _time_ms(module, _placed(case.part(batch), device), device)
            weights = sum(p.numel() * p.element_size() for p in module.parameters())
            roofline = case.roofline(peak, batch, ms, weights) if device == "cuda" else None
            yield Row(
                "torch",
                case.model.name,
                runtime,
                types,
                batch,
                ms,
                error,
                TOLERANCES["fp16" if half else "fp32"],
                roofline,
            )


def _time_ms(module: Any, tensors: dict[str, torch.Tensor], device: str) -> float:
    """Times calls by CUDA events on the GPU, by the wall clock on the CPU; inputs are in place."""
    with torch.inference_mode():
        if device == "cpu":
            return wall_ms(lambda: module(**tensors))
        for _ in range(3):
            module(**tensors)
        times = []
        for _ in range(_EVENTS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            module(**tensors)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)

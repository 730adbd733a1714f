"""Times the modules that the release was exported from, eager and compiled: gpu-check's torch rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.bench.gpu_engines import BATCHES, Case, Feeds, Row, wall_ms
from builders.compile.stage import TOLERANCES
from builders.encoders.checkpoint import read_encoders
from builders.encoders.models import ItemRows
from builders.presets import preset
from builders.ranker.checkpoint import read_ranker

_EVENTS = 50


def torch_rows(case: Case) -> Iterator[Row]:
    """Rows of eager torch in fp32 and fp16, and of torch.compile, on the GPU where there is one."""
    module = find_module(case)
    if module is None:
        yield Row(
            "engine",
            case.model.name,
            "torch",
            note="no checkpoint beside this release gives its numbers: build it in this repository",
        )
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device).eval()
    ways = {"torch eager": module, "torch.compile": torch.compile(module)}
    for name, call in ways.items():
        for half in (False, True) if device == "cuda" else (False,):
            try:
                yield from _rows(case, f"{name} {device.upper()}", call, device, half)
            except (
                Exception
            ) as error:  # torch.compile needs a compiler and a backend, and fails with whatever they raise
                yield Row(
                    "engine",
                    case.model.name,
                    name,
                    note=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}",
                )


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


def _placed(feeds: Feeds, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in feeds.items()}


def _answer(case: Case, module: Any, tensors: dict[str, torch.Tensor]) -> Feeds:
    with torch.inference_mode():
        out = module(**tensors)
    out = out if isinstance(out, tuple) else (out,)
    return {
        spec.name: tensor.float().cpu().numpy() for spec, tensor in zip(case.model.outputs, out, strict=True)
    }


def _rows(case: Case, runtime: str, module: Any, device: str, half: bool) -> Iterator[Row]:
    """Times half precision by autocast: what a user of torch would do first."""
    types = "fp16+fp32" if half else "fp32"
    with torch.autocast(device, torch.float16, enabled=half):
        error = case.error(_answer(case, module, _placed(case.feeds, device)))
        for batch in BATCHES:
            ms = _time_ms(module, _placed(case.part(batch), device), device)
            roofline = case.roofline(batch, ms, 1.0) if device == "cuda" else None
            yield Row(
                "engine",
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

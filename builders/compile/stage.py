"""Stage `compile`: a release's ONNX models -> plans, beside the release.

TensorRT's plans fit one GPU and one TensorRT, so they are built where they are served: inside the serving
image on the GPU node. Plans for RTX cards are built anywhere (`--ahead`), for all such cards or for some of
them. The release itself never changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builders.compile.builder import Request, build_plan
from builders.compile.files import is_whole, move_in, room_for, seal, write_plan
from builders.compile.graph import (
    check_constants,
    drop_int8_activations,
    is_sparse,
    precision,
    read_model,
    use_every_input,
)
from builders.compile.samples import real_feeds
from builders.progress import Progress
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.engines import Engine, check_signature
from ensemble.engines.cuda import NO_GPU, gpu_facts
from ensemble.engines.flavors import (
    FLAVORS,
    MODULES,
    RTX,
    TENSORRT,
    precision_refusal,
    sm_refusal,
)
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import (
    MANIFEST,
    EngineKey,
    Node,
    Plan,
    Range,
    plans_folder,
    ranges,
    read_plan,
    source_onnx,
)
from ensemble.engines.tensorrt import (
    NOT_INSTALLED,
    TensorRTEngine,
    check_bindings,
    tensorrt_version,
    this_node,
)
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.repository import staging
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease, open_served

# Largest error of a plan against onnxruntime on the same feeds, relative to the largest output; by the
# coarsest type it computes
# in. fp32 runs on TF32 tensor cores (10 bits of mantissa); fp8 keeps 3 bits, int8 256 steps a tensor.
TOLERANCES = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 1e-1, "fp8": 2e-1}


@dataclass(frozen=True)
class Toolchain:
    """Holds what builds and opens plans here; tests bring one that needs no GPU."""

    node: Node  # gpu, sm and cuda are empty where plans are built ahead of the node that will run them
    build: Callable[[Request], bytes]
    open: Callable[[Path], Engine]  # not called where there is no GPU


@dataclass(frozen=True)
class Compiled:
    """Holds one row of the closing table."""

    model: str
    key: str
    precision: str
    duration_s: float  # 0 when the plan was there already
    size_bytes: int
    relative_error: float | None  # of the outputs, against onnxruntime on real feeds; None: not opened yet
    reused: bool
    notes: tuple[str, ...] = ()  # what the builder warned of, and what this GPU makes of the precisions


def tensorrt_toolchain() -> Toolchain:
    """This machine's TensorRT on this machine's GPU; ReleaseError names what is missing."""
    return toolchain(TENSORRT)


def toolchain(flavor: str = "auto", *, ahead: bool = False) -> Toolchain:
    """Gives what builds plans of a flavour here; "auto" takes TensorRT where it can, else TensorRT for RTX.

    `ahead` needs no GPU. ReleaseError names what is missing, InvalidInput what cannot be.
    """
    if flavor not in ("auto", *FLAVORS):
        raise InvalidInput(f"--flavor {flavor}: known are auto, {', '.join(FLAVORS)}")
    if ahead:
        if flavor == TENSORRT:
            raise InvalidInput(
                "--ahead: TensorRT builds on the GPU that will run the plan; leave --ahead out there, or "
                "build for RTX cards: --flavor rtx"
            )
        check_bindings(RTX)
        return Toolchain(
            Node("", "", tensorrt_version(RTX), "", RTX), partial(build_plan, flavor=RTX), TensorRTEngine
        )
    try:
        chosen = _flavor_here() if flavor == "auto" else flavor
        node = this_node(chosen)
    except ReleaseError as error:
        if error.fact != NO_GPU[0]:
            raise
        raise ReleaseError(error.fact, f"{error.cure}, those for RTX cards anywhere: --ahead") from None
    check_bindings(chosen)
    return Toolchain(node, partial(build_plan, flavor=chosen), TensorRTEngine)


def _flavor_here() -> str:
    """Chooses the flavour that this machine's GPU and packages allow; ReleaseError where there is none."""
    gpu, sm, _ = gpu_facts()
    if importlib.util.find_spec(MODULES[TENSORRT]):
        return TENSORRT
    if not importlib.util.find_spec(MODULES[RTX]):
        raise ReleaseError(*NOT_INSTALLED[TENSORRT])
    if why := sm_refusal(RTX, sm):
        raise ReleaseError(
            f"TensorRT is not installed here, and {why}",
            f"{gpu} wants TensorRT: {NOT_INSTALLED[TENSORRT][1]}",
        )
    return RTX


def compile_release(
    repository: Path,
    name: str,
    tools: Toolchain,
    *,
    portable: bool = False,
    targets: tuple[str, ...] = (),
    progress: Progress = lambda share, text: None,
) -> list[Compiled]:
    """Plans for every engine of release `name`; those that are there and whole are kept. Killed, the next
    call goes on where it was.

    `portable` is TensorRT's way to other GPUs, `targets` (compute capabilities) that of TensorRT for RTX.
    """
    _check_options(tools.node.flavor, portable, targets)
    release = open_served(repository.resolve(), name)
    models = engine_models(release)
    progress(0.0, "real users' feeds")
    release.verify([source_onnx(release, model.name) for model in models])
    feeds = real_feeds(release, models)
    done = []
    for place, model in enumerate(models):
        progress(place / len(models), model.name)
        with room_for(release):
            done.append(_compile_model(release, model, feeds[model.name], tools, portable, targets))
    return done


def _check_options(flavor: str, portable: bool, targets: tuple[str, ...]) -> None:
    """Raises InvalidInput for an option that this flavour does not have."""
    if portable and flavor == RTX:
        raise InvalidInput(
            "--portable is TensorRT's: a plan for RTX cards is portable unless --for names some"
        )
    if targets and flavor == TENSORRT:
        raise InvalidInput(
            "--for is for RTX cards: TensorRT builds for this GPU, or --portable; add --flavor rtx"
        )


def engine_models(release: ServedRelease) -> list[ModelSpec]:
    """Lists what runs as ONNX or as a plan: the pipeline's engines, and the item encoder outside it."""
    return [
        *(model for model in release.pipeline.models if model.is_engine),
        contract.item_encoder(release.schema),
    ]


def _compile_model(
    release: ServedRelease,
    model: ModelSpec,
    feeds: Tensors,
    tools: Toolchain,
    portable: bool,
    targets: tuple[str, ...],
) -> Compiled:
    source = source_onnx(release, model.name)
    data = source.read_bytes()
    graph = read_model(data, str(source))
    notes = check_constants(graph, str(source))
    key = engine_key(data, graph, ranges(model, release.pipeline.max_batch), tools.node, portable, targets)
    _check_fits(model, key, tools.node)
    folder = plans_folder(release.repository, release.name) / key.digest
    if is_whole(folder):
        return _kept(read_plan(folder / MANIFEST), model, source, feeds, tools)
    use_every_input(graph)
    if key.flavor == RTX:
        drop_int8_activations(graph)
    notes += _precision_notes(key)
    cache = timing_cache(release.repository, tools.node)
    started = time.monotonic()
    plan_bytes = tools.build(
        Request(graph.SerializeToString(), key.profile, key.sparse, portable, cache, targets, notes.append)
    )
    duration_s = time.monotonic() - started
    facts: dict[str, Any] = {
        "model": model.name,
        "member": f"{release.name}_{model.name}",
        "build_s": round(duration_s, 3),
        "key": dataclasses.asdict(key),
        "notes": notes,
    }
    with staging(release.repository) as stage:
        path = write_plan(stage / folder.name, release, model, plan_bytes, feeds, facts)
        error = _check_plan(path, key, model, source, feeds, tools)
        seal(stage / folder.name, {**facts, "relative_error": error})
        move_in(release, stage / folder.name, folder)
    return Compiled(
        model.name, key.digest, key.precision, duration_s, len(plan_bytes), error, False, tuple(notes)
    )


def _kept(plan: Plan, model: ModelSpec, source: Path, feeds: Tensors, tools: Toolchain) -> Compiled:
    """Describes a plan that is there; one that was built ahead is compared where it can be opened at last."""
    error = plan.facts["relative_error"]
    if error is None:
        error = _check_plan(plan.path, plan.key, model, source, feeds, tools)
        if error is not None:
            facts = {
                name: value
                for name, value in plan.facts.items()
                if name not in ("format", "created", "files")
            }
            seal(plan.folder, {**facts, "relative_error": error})
    size, notes = plan.path.stat().st_size, tuple(plan.facts.get("notes", ()))
    return Compiled(model.name, plan.key.digest, plan.key.precision, 0.0, size, error, True, notes)


def engine_key(
    data: bytes,
    graph: onnx.ModelProto,
    profile: tuple[Range, ...],
    node: Node,
    portable: bool,
    targets: tuple[str, ...] = (),
) -> EngineKey:
    """Gives the key of the plan that `node` builds of this ONNX file."""
    machine = (node.cuda, node.sm, node.gpu) if node.flavor == TENSORRT else ("", "", "")
    return EngineKey(
        hashlib.sha256(data).hexdigest(),
        node.tensorrt,
        *machine,
        precision(graph),
        profile,
        is_sparse(graph),
        portable,
        flavor=node.flavor,
        targets=targets,
    )


def _check_fits(model: ModelSpec, key: EngineKey, node: Node) -> None:
    """Raises ReleaseError where a GPU that the plan is for cannot have it: before a build, not after it."""
    cure = "compress with a recipe whose precisions for TensorRT it has"
    for sm in key.targets or ([node.sm] if node.sm else []):
        if lacking := precision_refusal(key.precision, sm, key.flavor):
            raise ReleaseError(f"{model.name}: {lacking}", cure)


def _precision_notes(key: EngineKey) -> list[str]:
    """Says what a flavour makes of the types that the model names, where that is not what they say."""
    if key.flavor != RTX or "int8" not in key.precision.split("+"):
        return []
    return [
        "int8 saves memory, not arithmetic: TensorRT for RTX has int8 for weights only, multiplies in fp16; "
        "fp8 is the faster one, from SM 8.9 on"
    ]


def timing_cache(repository: Path, node: Node) -> Path:
    """Names the file of what TensorRT measured while it built; useless to another version or kind of GPU."""
    gpu = re.sub(r"\W+", "-", node.gpu)
    return repository / ".build" / "tensorrt" / f"timing-{node.tensorrt}-{gpu}-sm{node.sm}.cache"


def _check_plan(
    path: Path, key: EngineKey, model: ModelSpec, source: Path, feeds: Tensors, tools: Toolchain
) -> float | None:
    """Runs the plan and onnxruntime on the same real feeds; ReleaseError if tensors differ from the
    contract's or numbers too much. None where the plan cannot be opened here."""
    if not tools.node.sm or key.difference(tools.node):
        return None
    engine, types = tools.open(path), key.precision
    check_signature(engine, model, path)
    found, wanted = engine.run(feeds), OnnxEngine(source, 1, fuse=types == "fp32").run(feeds)
    error = max(relative_error(found[tensor.name], wanted[tensor.name]) for tensor in model.outputs)
    tolerance = max(TOLERANCES[kind] for kind in types.split("+"))
    if not error <= tolerance:
        raise ReleaseError(
            f"{model.name}: the plan's outputs differ from onnxruntime's by {error:.1e} ({types}: at most "
            f"{tolerance:.0e}); it is not kept",
        )
    return error


def relative_error(found: Array, wanted: Array) -> float:
    """Gives the largest difference, relative to the largest wanted value; NaN stays NaN.

    Values near 0 have no scale of their own.
    """
    return float(np.abs(found - wanted).max() / max(1e-6, float(np.abs(wanted).max())))

"""Stage `compile`: a release's ONNX models -> TensorRT plans for the GPU of this machine, beside the release.

Plans fit one GPU and one TensorRT, so they are built where they are served: inside the serving image on the
GPU node. The release itself never changes. Plans are built with the API that TensorRT 10.12 to 11 share, on
strongly typed networks: the ONNX model says what is fp16, int8 or fp8. TensorRT 8.5, which the check on a
bare GPU host brings, is weakly typed; what differs there is in _old_* and nowhere else. Polygraphy is not
used: it hides the differences between versions, but of those we have one, and it would have to be installed
in the serving image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from builders.compile.files import is_whole, move_in, room_for, seal, write_plan
from builders.compile.graph import is_sparse, precision, read_model, to_old_opset, use_every_input
from builders.compile.samples import real_feeds
from builders.progress import Progress
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.engines import Engine, check_signature
from ensemble.engines.onnx import OnnxEngine
from ensemble.engines.plans import (
    MANIFEST,
    EngineKey,
    Node,
    Range,
    plans_folder,
    ranges,
    read_plan,
    source_onnx,
)
from ensemble.engines.tensorrt import TensorRTEngine, import_tensorrt, logger, start, this_node
from ensemble.errors import ReleaseError
from ensemble.release.repository import staging
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease, open_served

# Largest error of a plan against onnxruntime on the same feeds, relative to the largest output; by the
# coarsest type it computes
# in. fp32 runs on TF32 tensor cores (10 bits of mantissa); fp8 keeps 3 bits, int8 256 steps a tensor.
TOLERANCES = {"fp32": 5e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 1e-1, "fp8": 2e-1}


@dataclass(frozen=True)
class Request:
    """Holds what one plan is built from."""

    onnx: bytes
    profile: tuple[Range, ...]
    sparse: bool
    portable: bool
    timing_cache: Path


@dataclass(frozen=True)
class Toolchain:
    """Holds what builds and opens plans here; tests bring one that needs no GPU."""

    node: Node
    build: Callable[[Request], bytes]
    open: Callable[[Path], Engine]


@dataclass(frozen=True)
class Compiled:
    """Holds one row of the closing table."""

    model: str
    key: str
    precision: str
    duration_s: float  # 0 when the plan was there already
    size_bytes: int
    relative_error: float  # of the outputs, against onnxruntime on real feeds
    reused: bool


def tensorrt_toolchain() -> Toolchain:
    """This machine's TensorRT on this machine's GPU; ReleaseError names what is missing."""
    return Toolchain(this_node(), build_plan, TensorRTEngine)


def compile_release(
    repository: Path,
    name: str,
    tools: Toolchain,
    *,
    portable: bool = False,
    progress: Progress = lambda share, text: None,
) -> list[Compiled]:
    """Plans for every engine of release `name`; those that are there and whole are kept. Killed, the next
    call goes on where it was."""
    release = open_served(repository.resolve(), name)
    models = engine_models(release)
    progress(0.0, "real users' feeds")
    release.verify([source_onnx(release, model.name) for model in models])
    feeds = real_feeds(release, models)
    done = []
    for place, model in enumerate(models):
        progress(place / len(models), model.name)
        with room_for(release):
            done.append(_compile_model(release, model, feeds[model.name], tools, portable))
    return done


def engine_models(release: ServedRelease) -> list[ModelSpec]:
    """Lists what runs as ONNX or as a plan: the pipeline's engines, and the item encoder outside it."""
    return [
        *(model for model in release.pipeline.models if model.is_engine),
        contract.item_encoder(release.schema),
    ]


def _compile_model(
    release: ServedRelease, model: ModelSpec, feeds: Tensors, tools: Toolchain, portable: bool
) -> Compiled:
    source = source_onnx(release, model.name)
    data = source.read_bytes()
    graph = read_model(data, str(source))
    key = engine_key(data, graph, ranges(model, release.pipeline.max_batch), tools.node, portable)
    types = key.precision
    folder = plans_folder(release.repository, release.name) / key.digest
    if is_whole(folder):
        plan = read_plan(folder / MANIFEST)
        return Compiled(
            model.name, key.digest, types, 0.0, plan.path.stat().st_size, plan.facts["relative_error"], True
        )
    use_every_input(graph)
    cache = timing_cache(release.repository, tools.node)
    started = time.monotonic()
    plan_bytes = tools.build(Request(graph.SerializeToString(), key.profile, key.sparse, portable, cache))
    duration_s = time.monotonic() - started
    facts: dict[str, Any] = {
        "model": model.name,
        "member": f"{release.name}_{model.name}",
        "build_s": round(duration_s, 3),
        "key": dataclasses.asdict(key),
    }
    with staging(release.repository) as stage:
        path = write_plan(stage / folder.name, release, model, plan_bytes, feeds, facts)
        error = _check_plan(path, model, source, feeds, types, tools)
        seal(stage / folder.name, {**facts, "relative_error": error})
        move_in(release, stage / folder.name, folder)
    return Compiled(model.name, key.digest, types, duration_s, len(plan_bytes), error, False)


def engine_key(
    data: bytes, graph: onnx.ModelProto, profile: tuple[Range, ...], node: Node, portable: bool
) -> EngineKey:
    """Gives the key of the plan that `node` builds of this ONNX file."""
    digest = hashlib.sha256(data).hexdigest()
    return EngineKey(
        digest,
        node.tensorrt,
        node.cuda,
        node.sm,
        node.gpu,
        precision(graph),
        profile,
        is_sparse(graph),
        portable,
    )


def timing_cache(repository: Path, node: Node) -> Path:
    """Names the file of what TensorRT measured while it built here; useless to another version or SM."""
    return repository / ".build" / "tensorrt" / f"timing-{node.tensorrt}-sm{node.sm}.cache"


def _check_plan(
    path: Path, model: ModelSpec, source: Path, feeds: Tensors, types: str, tools: Toolchain
) -> float:
    """Runs the plan and onnxruntime on the same real feeds; ReleaseError if tensors differ from the
    contract's or numbers too much."""
    engine = tools.open(path)
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


# --- TensorRT


def build_plan(request: Request) -> bytes:
    """Builds a plan of an ONNX model on this GPU; ReleaseError names the node that TensorRT does not take."""
    trt = import_tensorrt()
    log = logger(trt)
    old = _is_old(trt)
    builder = start(trt.Builder, log)
    network = builder.create_network(
        _old_network_flags(trt) if old else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    _parse(trt, network, log, _old_onnx(request.onnx) if old else request.onnx)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, request.profile))
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if old:
        _old_settings(trt, config, request)
    elif request.portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    _load_timing_cache(config, request.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ReleaseError(f"TensorRT {trt.__version__} built no plan: {log.last_line()}")
    _save_timing_cache(config, request.timing_cache)
    return bytes(plan)


def _parse(trt: Any, network: Any, log: Any, onnx_bytes: bytes) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse(onnx_bytes):
        return
    nodes = read_model(onnx_bytes, "the model for TensorRT").graph.node
    error = parser.get_error(0) if parser.num_errors else None
    place = error.node() if error else -1
    where = f"node {nodes[place].name} ({nodes[place].op_type})" if 0 <= place < len(nodes) else "the model"
    raise ReleaseError(
        f"TensorRT {trt.__version__} does not take {where}: {error.desc() if error else log.last_line()}"
    )


def _profile(builder: Any, wanted: tuple[Range, ...]) -> Any:
    profile = builder.create_optimization_profile()
    for one in wanted:
        profile.set_shape(one.name, one.least, one.usual, one.most)
    return profile


def _load_timing_cache(config: Any, path: Path) -> None:
    """Loads what earlier builds measured; a cache that TensorRT does not take is started anew.

    It may be another version's, or damaged.
    """
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_old(trt: Any) -> bool:
    """Says whether this is TensorRT 8: weakly typed, with names that 11 no longer has.

    Nothing between 8.6 and 10.11 is supported.
    """
    return int(trt.__version__.partition(".")[0]) < 10


def _old_network_flags(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.__members__["EXPLICIT_BATCH"])


def _old_onnx(data: bytes) -> bytes:
    return bytes(to_old_opset(read_model(data, "the model for TensorRT 8.5")).SerializeToString())


def _old_settings(trt: Any, config: Any, request: Request) -> None:
    """Types are builder flags; no cuBLAS and cuDNN, which are stand-ins in the kit for bare hosts."""
    types = precision(read_model(request.onnx, "the model")).split("+")
    if request.portable or "fp8" in types or "bf16" in types:
        raise ReleaseError(
            f"TensorRT {trt.__version__} has neither portable plans nor fp8 and bf16", "use 10.12 or newer"
        )
    for kind in {"fp16", "int8"} & set(types):
        config.set_flag(trt.BuilderFlag.__members__[kind.upper()])
    config.set_tactic_sources(0)

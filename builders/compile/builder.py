"""Builds one plan of an ONNX model with either flavour of TensorRT, and listens to what the builder says.

Plans are built with the API that TensorRT 10.12 to 11 and TensorRT for RTX share, on strongly typed
networks: the ONNX model says what is fp16, int8 or fp8. TensorRT 8.5, which the check on a bare GPU host
brings, is weakly typed; what differs there is in _old_* and nowhere else. Polygraphy is not used: it hides
the differences between versions, but of those we have one, and it would have to be installed in the serving
image.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.compile.graph import precision, read_model, to_old_opset
from ensemble.engines.flavors import RTX, TENSORRT, TITLES, version_from_text
from ensemble.engines.plans import Range
from ensemble.engines.tensorrt import check_bindings, logger, start
from ensemble.errors import InvalidInput, ReleaseError

# How lines of the compiler inside TensorRT for RTX begin that it prints, and does not give to the logger.
_LOUD = ("WARNING", "ERROR", "FATAL")


def _ignore(line: str) -> None:
    """Takes a line and drops it."""


@dataclass(frozen=True)
class Request:
    """Holds what one plan is built from."""

    onnx: bytes
    profile: tuple[Range, ...]
    sparse: bool
    portable: bool
    timing_cache: Path
    targets: tuple[str, ...] = ()  # compute capabilities, of RTX cards alone; none: the builder's default
    hear: Callable[[str], None] = _ignore  # takes each line in which the builder warns


def build_plan(request: Request, flavor: str = TENSORRT) -> bytes:
    """Builds a plan of an ONNX model; ReleaseError names the node that the parser does not take."""
    trt = check_bindings(flavor)
    version = version_from_text(flavor, trt.__version__)
    if not version.is_supported:
        raise ReleaseError(
            f"TensorRT {trt.__version__} is none that plans are built with", "use 10.12 or newer"
        )
    log = logger(trt)
    heard, old = log.count, version.is_old
    builder = start(trt.Builder, log)
    with _overheard(request.hear):
        network, parser = parsed(trt, builder, _old_onnx(request.onnx) if old else request.onnx, old)
        config = _config(trt, builder, request, flavor, old)
        if flavor == TENSORRT:
            _load_timing_cache(config, request.timing_cache)
        plan = builder.build_serialized_network(network, config)
    del parser  # whose memory the network's weights may be until here
    for line in log.since(heard):
        request.hear(line)
    if plan is None:
        raise ReleaseError(f"{TITLES[flavor]} {trt.__version__} built no plan: {log.last_line()}")
    if flavor == TENSORRT:  # RTX cards time nothing while they build: there may be none
        try:
            _save_timing_cache(config, request.timing_cache)
        except OSError as error:  # the plan is as good without it
            request.hear(f"what was timed is not kept: {error}")
    return bytes(plan)


def target_names(text: str) -> tuple[str, ...]:
    """Reads "sm89,sm120" as ("8.9", "12.0"); InvalidInput names what the RTX builder cannot build for."""
    trt = check_bindings(RTX)
    known = {
        name.lower(): f"{name[2:-1]}.{name[-1]}"
        for name in trt.ComputeCapability.__members__
        if name.startswith("SM")
    }
    asked = [part.strip().lower() for part in text.split(",") if part.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise InvalidInput(
            f"--for {text}: {', '.join(unknown) or 'nothing'} is no target; known: {', '.join(known)}"
        )
    return tuple(
        sorted({known[name] for name in asked}, key=lambda sm: [int(part) for part in sm.split(".")])
    )


def _config(trt: Any, builder: Any, request: Request, flavor: str, old: bool) -> Any:
    """Gives the builder's configuration for a request."""
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, request.profile))
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if old:
        _old_settings(trt, config, request)
    elif flavor == RTX:
        _rtx_settings(trt, config, request)
    elif request.portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def _rtx_settings(trt: Any, config: Any, request: Request) -> None:
    """Names the compute capabilities; a plan for CURRENT would need the GPU."""
    if request.targets:
        config.num_compute_capabilities = len(request.targets)
        for place, sm in enumerate(request.targets):
            config.set_compute_capability(
                trt.ComputeCapability.__members__[f"SM{sm.replace('.', '')}"], place
            )


def parsed(trt: Any, builder: Any, onnx_bytes: bytes, old: bool = False) -> tuple[Any, Any]:
    """Gives the network of an ONNX model and its parser, which must live as long.

    ReleaseError names the node that the parser does not take.
    """
    flags = _old_network_flags(trt) if old else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    log, network = logger(trt), builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if parser.parse(onnx_bytes):
        return network, parser
    nodes = read_model(onnx_bytes, "the model for TensorRT").graph.node
    error = parser.get_error(0) if parser.num_errors else None
    place = error.node() if error else -1
    where = f"node {nodes[place].name} ({nodes[place].op_type})" if 0 <= place < len(nodes) else "the model"
    raise ReleaseError(
        f"TensorRT {trt.__version__} does not take {where}: {error.desc() if error else log.last_line()}"
    )


@contextlib.contextmanager
def _overheard(hear: Callable[[str], None]) -> Iterator[None]:
    """Gives `hear` the warnings that native code prints meanwhile; all else goes on to where it was printed.

    File descriptors are what is caught: such code does not write to Python's sys.stdout, and a warning there
    would spoil what --json prints.
    """
    with contextlib.ExitStack() as stack:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            stack.enter_context(_caught(descriptor, hear))
        yield


@contextlib.contextmanager
def _caught(descriptor: int, hear: Callable[[str], None]) -> Iterator[None]:
    """Catches one file descriptor as _overheard says."""
    kept = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # what C's own buffers still hold
            os.dup2(kept, descriptor)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if line.startswith(_LOUD):
                    hear(line.strip())
                else:
                    os.write(descriptor, line.encode())


def _profile(builder: Any, wanted: tuple[Range, ...]) -> Any:
    profile = builder.create_optimization_profile()
    for one in wanted:
        profile.set_shape(one.name, one.least, one.usual, one.most)
    return profile


def _load_timing_cache(config: Any, path: Path) -> None:
    """Loads what earlier builds measured; a cache that TensorRT does not take is started anew.

    It may be another GPU's or version's, or damaged.
    """
    cache = _kept_timings(config, path)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _kept_timings(config: Any, path: Path) -> Any:
    """Reads a file of timings; None where there is none, or TensorRT takes it for none."""
    return config.create_timing_cache(path.read_bytes()) if path.exists() else None


def _save_timing_cache(config: Any, path: Path) -> None:
    """Adds what was measured to what the file holds by now: pods of one volume write it at the same time.

    It is written aside and renamed, so readers find one whole file; of two that rename within the same
    moment the first one's additions are lost, and measured again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own, kept = config.get_timing_cache(), _kept_timings(config, path)
    if kept is not None:
        own.combine(kept, False)
    # Process ids are no names here: in each container they begin at 1
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(own.serialize()))
        Path(partial).rename(path)
    finally:
        Path(partial).unlink(missing_ok=True)


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

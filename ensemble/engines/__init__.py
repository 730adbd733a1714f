"""Is the seam between steps and runtimes: an Engine runs named arrays; open_engine chooses by the file's
suffix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.engines.flavors import RTX, TENSORRT
from ensemble.errors import ReleaseError
from ensemble.options import Options
from ensemble.release.release import Release
from ensemble.spec import ModelSpec, TensorSpec

# Users run at once: beyond, a ranker's activations outgrow the core's cache (1.67 ms a user at 8, 2.03 at 64:
# DECISIONS.md).
CHUNK = 8
# What engine steps run on, set by `peregrine serve` for the whole server, because a release never names a
# runtime.
ENGINE_VARIABLE = "PEREGRINE_ENGINE"
ONNXRUNTIME, ONNXRUNTIME_GPU = "onnxruntime", "onnxruntime-gpu"
ENGINES = (TENSORRT, RTX, ONNXRUNTIME_GPU, ONNXRUNTIME)  # best first
# The same for where recall searches its main index.
INDEX_VARIABLE = "PEREGRINE_INDEX"
CPU, GPU = "cpu", "gpu"
SHARDS_VARIABLE = "PEREGRINE_INDEX_SHARDS"  # in how many parts; one if it is not set
# The repository that steps read: what Triton reads is the server's mount, with nothing but models; and the
# home, where changes of items lie.
REPOSITORY_VARIABLE, HOME_VARIABLE = "PEREGRINE_REPOSITORY", "PEREGRINE_CATALOGUE"


class Engine(Protocol):
    """Runs a loaded model.

    `inputs` and `outputs` list (name, numpy dtype name, dims without the batch; None where one varies).
    """

    inputs: list[tuple[str, str, tuple[int | None, ...]]]
    outputs: list[tuple[str, str, tuple[int | None, ...]]]

    def run(self, feeds: Tensors) -> Tensors:
        """Turns arrays by name into arrays by name; the first axis is the batch."""
        ...


def open_engine(path: Path, threads: int = 1, *, gpu: bool = False) -> Engine:
    """Opens a model file, .onnx or .plan; ReleaseError names the file when it cannot be opened.

    `gpu` asks for ONNX Runtime's CUDA provider, or an error.
    """
    if path.suffix == ".onnx":
        from ensemble.engines.onnx import OnnxEngine
        from ensemble.engines.onnx_cuda import open_cuda

        return open_cuda(path, threads) if gpu else OnnxEngine(path, threads)
    if path.suffix == ".plan":
        from ensemble.engines.tensorrt import TensorRTEngine

        return TensorRTEngine(path)
    raise ReleaseError(f"{path}: no engine runs {path.suffix or 'this file'}", "known: .onnx, .plan")


def check_signature(engine: Engine, model: ModelSpec, path: Path) -> None:
    """Raises ReleaseError unless the engine takes and gives exactly the model's tensors."""
    for what, described, wanted in (
        ("takes", engine.inputs, model.inputs),
        ("gives", engine.outputs, model.outputs),
    ):
        differing = signature_difference(described, wanted)
        if differing:
            raise ReleaseError(
                f"{path}: the model {what} {differing}",
                f"the contract of {model.name} wants {', '.join(str(t) for t in wanted)}",
            )


def signature_difference(
    described: list[tuple[str, str, tuple[int | None, ...]]], wanted: tuple[TensorSpec, ...]
) -> str:
    """Names the first tensor that is missing, extra or shaped otherwise; empty when all fit."""
    have = {name: (dtype, dims) for name, dtype, dims in described}
    for spec in wanted:
        if spec.name not in have:
            return f"no tensor {spec.name}"
        dtype, dims = have.pop(spec.name)
        if (
            dtype != spec.dtype
            or len(dims) != len(spec.dims)
            or any(d not in (None, s) for d, s in zip(dims, spec.dims, strict=True))
        ):
            return f"{spec.name} as {dtype} {list(dims)} instead of {spec.dtype} {list(spec.dims)}"
    return f"an extra tensor {next(iter(have))}" if have else ""


MARKED = "candidate_features"  # of a user whom the ranker need not see, the first number is NaN


class EngineStep:
    """Is the step of every engine model: it opens the release's model file or its plan, verified."""

    def __init__(self, model: ModelSpec, release: Release) -> None:
        runtime = os.environ.get(ENGINE_VARIABLE, ONNXRUNTIME)
        if runtime not in ENGINES:
            raise ReleaseError(f"{ENGINE_VARIABLE}={runtime}: known are {', '.join(ENGINES)}")
        if runtime in (TENSORRT, RTX):
            path = _plan_path(model, release, runtime)
        else:
            path = release.member_file(model.name, "model.onnx")
            release.verify([path])
        self.engine = open_engine(path, gpu=runtime == ONNXRUNTIME_GPU)
        self._chunk = CHUNK if runtime == ONNXRUNTIME else release.pipeline.max_batch
        # On the GPU a batch of each size is captured when it is first run, which takes .1 s.
        if runtime == ONNXRUNTIME_GPU:
            self.warm_sizes = tuple(1 << power for power in range((self._chunk - 1).bit_length() + 1))
        check_signature(self.engine, model, path)

    def run(self, options: Options, **tensors: Array) -> Tensors:
        """Turns the model's inputs by name into its outputs, large batches in chunks that fit the cache.

        Users that recall has marked as late are left out: their outputs are 0.
        """
        late = late_users(tensors)
        if late is not None and late.any():
            return self._of_others(options, tensors, ~late)
        if len(options) <= self._chunk:
            return self.engine.run(tensors)
        pieces = [slice(start, start + self._chunk) for start in range(0, len(options), self._chunk)]
        parts = [
            self.engine.run({name: tensor[piece] for name, tensor in tensors.items()}) for piece in pieces
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _of_others(self, options: Options, tensors: Tensors, kept: Array) -> Tensors:
        """Runs the engine for the users that are kept [B] bool, at least for one: it tells the shapes."""
        users = np.flatnonzero(kept) if kept.any() else np.zeros(1, np.int64)
        given = {name: tensor[users] for name, tensor in tensors.items()}
        given[MARKED] = np.nan_to_num(given[MARKED])
        found = self.run(options.of(users), **given)
        out = {name: np.zeros((len(kept), *tensor.shape[1:]), tensor.dtype) for name, tensor in found.items()}
        for name, tensor in found.items():
            out[name][users] = tensor
        return out


def late_users(tensors: Tensors) -> Array | None:
    """Says whom recall has marked as late: [B] bool; None where a model has no candidates."""
    features = tensors.get(MARKED)
    return None if features is None or not features.size else np.isnan(features[:, 0, 0])


def _plan_path(model: ModelSpec, release: Release, flavor: str) -> Path:
    """Finds the plan of this flavour that fits this node; opening it verifies it."""
    from ensemble.engines.plans import find_plan
    from ensemble.engines.tensorrt import this_node

    return find_plan(release, model.name, this_node(flavor)).path

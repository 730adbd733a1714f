"""Says what a pipeline is: axes, tensors, models and how they are wired. Wrong wiring is refused when it is
built.

The names are the wiring: a tensor has one name everywhere (forward parameter = ONNX input = engine input =
config.pbtxt input = step keyword = client field), so a model needs no input map, only the tensors it takes
and gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ensemble.errors import WiringError

Dtype = Literal["float32", "int64", "int32", "bool", "bytes"]
BATCH = "B"


@dataclass(frozen=True)
class Axis:
    """Names one axis of a tensor; `size` None means that it varies from call to call."""

    letter: str
    meaning: str
    size: int | None


@dataclass(frozen=True)
class TensorSpec:
    """Names an array. The first axis is always the batch B; `dims` are the sizes of the others."""

    name: str
    dtype: Dtype
    axes: tuple[Axis, ...]
    meaning: str

    @property
    def dims(self) -> tuple[int | None, ...]:
        """Gives the sizes without the batch axis; None where one varies."""
        return tuple(axis.size for axis in self.axes[1:])

    def __post_init__(self) -> None:
        if not self.axes or self.axes[0].letter != BATCH:
            raise WiringError(
                f"tensor {self.name}: the first axis must be {BATCH}, got {[a.letter for a in self.axes]}"
            )

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(axis.letter for axis in self.axes)}] {self.dtype}"


@dataclass(frozen=True)
class ModelSpec:
    """Describes one step: the tensors it takes and gives, and the class that runs it ("module:Class").

    An engine step is ENGINE_STEP: it runs the release's `model.onnx`, or the plan made of it.
    """

    name: str
    step: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    instances: int = 2  # a dead stub is never restarted: one alone would take its step down with it

    @property
    def is_engine(self) -> bool:
        """Says whether the step runs a model file; else it runs Python."""
        return self.step == ENGINE_STEP


ENGINE_STEP = "ensemble.engines:EngineStep"
FUSED_STEP = "ensemble.local:FusedStep"


@dataclass(frozen=True)
class PipelineSpec:
    """Lists models in an order in which each one's inputs are there: a DAG, checked when it is built."""

    name: str
    inputs: tuple[TensorSpec, ...]
    models: tuple[ModelSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int

    def __post_init__(self) -> None:
        known = {tensor.name: tensor for tensor in self.inputs}
        for model in self.models:
            for tensor in model.inputs:
                self._check_source(model.name, tensor, known)
            for tensor in model.outputs:
                if tensor.name in known:
                    raise WiringError(
                        f"{self.name}: {model.name} gives {tensor.name}, which exists already",
                        "a tensor has one source",
                    )
                known[tensor.name] = tensor
        for tensor in self.outputs:
            self._check_source("the answer", tensor, known)

    def _check_source(self, taker: str, tensor: TensorSpec, known: dict[str, TensorSpec]) -> None:
        """Raises WiringError unless `known` has the very tensor that `taker` takes."""
        source = known.get(tensor.name)
        if source is None:
            raise WiringError(
                f"{self.name}: {taker} takes {tensor}, which nothing before it gives",
                f"known: {', '.join(known)}",
            )
        if (source.dtype, source.axes) != (tensor.dtype, tensor.axes):
            raise WiringError(f"{self.name}: {taker} takes {tensor}, but its source gives {source}")

    @property
    def fused(self) -> ModelSpec:
        """Describes the whole pipeline as one step, for where hops between processes cost more than they
        give."""
        return ModelSpec(self.name, FUSED_STEP, self.inputs, self.outputs)

    def model(self, name: str) -> ModelSpec:
        """Finds the model called `name`, or the fused pipeline under its own; else WiringError."""
        if name == self.name:
            return self.fused
        for model in self.models:
            if model.name == name:
                return model
        raise WiringError(
            f"{self.name} has no model {name!r}", f"it has {', '.join(m.name for m in self.models)}"
        )

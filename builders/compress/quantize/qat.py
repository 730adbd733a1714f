"""Fine-tunes under the rounding of int8, where quantizing a trained module costs too much ranking.

The linear layers that are put at int8 round their weights and inputs in training just as quantize.py will
round them in the ONNX graph: same scales, same zeros, same ends. Rounding has no gradient, so it is passed
straight through (Bengio et al. 2013; Jacob et al. 2018 "Quantization and training of neural networks for
efficient integer-arithmetic-only inference"). What comes out is an fp32 module: export it, and quantize it
with the very ranges it was trained with. Its teacher is the module as it was: no labels.

Ranges are fixed from calibration, not learned: the inserter could not share a learned one between the layers
that read a tensor. Tables and products of two activations keep full precision in training; their rounding has
no weights to learn around it. Axes: K inputs and O outputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from builders.compress import graph
from builders.compress.distil.distil import DistilLosses, distil_loss
from builders.compress.finetune import Batches, Loss, finetune
from builders.compress.quantize import onnxruntime_graph
from builders.compress.quantize.calibration import Ranges
from builders.progress import Progress
from ensemble.errors import InvalidInput

_MAX_CODE = 127  # of symmetric codes
# at temperature 1: QAT has to find the teacher's own answers again, not learn what it knows
_KD = DistilLosses(kd=1.0, temperature=1.0)


@dataclass(frozen=True)
class Grid:
    """Says how one linear layer's input is rounded, each column by itself: x = scale * code."""

    scale: Tensor  # [K] float32
    low: Tensor  # [K] float32, smallest code; 0 is a code
    high: Tensor  # [K] float32, largest code

    def round_input(self, values: Tensor) -> Tensor:
        """Rounds values [..., K] to the nearest that int8 holds, clipped to the range."""
        codes = values / self.scale
        return torch.minimum(torch.maximum(_rounded(codes), self.low), self.high) * self.scale

    def round_weight(self, weight: Tensor) -> Tensor:
        """Rounds weight [O, K] to symmetric codes with one scale an output.

        Inputs of several scales are moved into the weight's columns first.
        """
        columns = self.scale / self.scale.max()
        moved = weight * columns
        step = (moved.detach().abs().amax(1, keepdim=True) / _MAX_CODE).clamp(min=1e-12)
        return _rounded(moved / step).clamp(-_MAX_CODE, _MAX_CODE) * step / columns


def qat(
    module: nn.Module,
    model: bytes,
    precisions: Mapping[str, str],
    ranges: Ranges,
    batches: Batches,
    *,
    runtime: str = "onnxruntime",
    steps: int = 500,
    learning_rate: float = 1e-4,
    seed: int = 0,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Fine-tunes an fp32 copy of `module` whose answers suffer less when it is quantized.

    That is by `quantize(its ONNX, precisions, ranges, runtime)`.

    `model` is the fp32 ONNX of `module`, `ranges` its calibration; precisions by block name, as for quantize.
    `loss` is kd with `module` as the teacher, unless given. InvalidInput when no linear layer of the module
    is at int8.
    """
    found = {
        name: grid
        for name, grid in grids(model, precisions, ranges, runtime).items()
        if isinstance(_part(module, name), nn.Linear)
    }
    if not found:
        raise InvalidInput(
            f"qat: none of {', '.join(precisions) or 'no nodes'} is a linear layer at int8; fine-tuning for "
            "rounding needs one"
        )
    tuned = copy.deepcopy(module)
    with rounding(tuned, found):
        finetune(
            tuned,
            loss or distil_loss(module, _KD),
            batches,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            progress=progress,
        )
    # with its parameters in their old order, which the rounding's coming and going has changed
    result = copy.deepcopy(module)
    result.load_state_dict(tuned.state_dict())
    return result.eval()


@contextmanager
def rounding(module: nn.Module, found: Mapping[str, Grid]) -> Iterator[None]:
    """Lets the layers named in `found` compute with rounded weights and inputs; gradients pass through."""
    handles, layers = [], [(module.get_submodule(name), grid) for name, grid in found.items()]
    for layer, grid in layers:
        parametrize.register_parametrization(layer, "weight", _RoundedWeight(grid))
        handles.append(
            layer.register_forward_pre_hook(
                lambda part, inputs, grid=grid: (grid.round_input(inputs[0]), *inputs[1:])
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, _ in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def grids(model: bytes, precisions: Mapping[str, str], ranges: Ranges, runtime: str) -> dict[str, Grid]:
    """Gives the grid of each linear block that `precisions` puts at int8, by the block's name.

    That is the module's name in torch.
    """
    proto = graph.load(model)
    known, found = graph.index(proto), {}
    for block in graph.blocks(proto):
        if precisions.get(block.name) == "int8" and block.weight is not None and block.op != "Gather":
            columns = (
                _symmetric(block.inputs[0], ranges)
                if runtime == "tensorrt"
                else _affine(block.inputs[0], known, ranges)
            )
            found[block.name] = Grid(
                *(torch.tensor(part, dtype=torch.float32) for part in zip(*columns, strict=True))
            )
    return found


def _affine(tensor: str, known: graph.Index, ranges: Ranges) -> list[tuple[float, int, int]]:
    """Gives (scale, smallest and largest code less the zero) of each column, uint8.

    Each part of a concatenation has its own, as in onnxruntime_graph.py.
    """
    if joined := onnxruntime_graph.joined_by(known.makers.get(tensor), tensor, ranges):
        return [column for name in joined for column in _affine(name, known, ranges)]
    scale, zero = onnxruntime_graph.affine(ranges[tensor])
    return [(scale, -zero, 255 - zero)] * ranges[tensor].shape[-1]


def _symmetric(tensor: str, ranges: Ranges) -> list[tuple[float, int, int]]:
    """Gives the same with one scale a tensor and int8, as in tensorrt_graph.py."""
    return [(max(ranges[tensor].clip / _MAX_CODE, 1e-12), -_MAX_CODE - 1, _MAX_CODE)] * ranges[tensor].shape[
        -1
    ]


class _RoundedWeight(nn.Module):
    """Rounds a layer's weight, as its parametrization."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """Rounds [O, K]."""
        return self.grid.round_weight(weight)


def _rounded(codes: Tensor) -> Tensor:
    """Rounds to the nearest integers; the gradient is that of the identity."""
    return codes + (codes.round() - codes).detach()


def _part(module: nn.Module, name: str) -> nn.Module | None:
    return dict(module.named_modules()).get(name)

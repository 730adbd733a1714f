"""Measures what users lose when one block of a model alone goes down in precision.

Ranking metrics of a few hundred users are noisy; how much of the shown lists changes is much less so, and the
error of the model's output not at all: all three are measured, and `cost` weighs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from builders.compress import graph
from builders.compress.graph import Block
from builders.compress.judge.judge import Judge, Judged, Loss, compare
from builders.compress.quantize.calibration import Ranges
from builders.compress.quantize.quantize import choices, quantize
from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.engines.onnx import open_session
from ensemble.errors import InvalidInput

_ERROR_USERS = 32
_PIECE = 16  # of 8-bit products on tensor cores


@dataclass(frozen=True)
class Sensitivity:
    """Holds a row of the table: one block alone at one precision."""

    name: str
    op: str
    parameters: int
    bytes_share: float  # of the fp32 model
    flops_share: float  # of all blocks
    precision: str
    loss: Loss
    output_error: float  # root mean square error of the outputs over their deviation: breaks ties

    @property
    def cost(self) -> float:
        """Gives the cost of the loss; among equals the smaller error of the output is better."""
        return self.loss.cost + 1e-3 * min(self.output_error, 1.0)


def sensitivities(
    model: bytes,
    feeds: Mapping[str, Array],
    judge: Judge,
    *,
    ranges: Ranges,
    runtime: str,
    precisions: tuple[str, ...],
    skip: frozenset[str],
    uncompressed: Judged,
    progress: Progress | None,
) -> list[Sensitivity]:
    """Judges every block but those to `skip`, alone at each precision it can have.

    The feeds are the calibration users'.
    """
    proto = graph.load(model)
    blocks = graph.blocks(proto)
    flops = block_flops(blocks, shapes_of(proto), ranges)
    total = sum(flops.values()) or 1.0
    possible = [(b, p) for b in blocks if b.name not in skip for p in precisions if p in choices(b, runtime)]
    todo = [(b, p) for b, p in possible if p != "fp16" or not fp16_misfit(model, b, ranges, runtime)]
    outputs = _outputs(model, feeds, runtime)
    rows = []
    for done, (block, precision) in enumerate(todo):
        variant = quantize(model, {block.name: precision}, ranges, runtime)
        loss = compare(uncompressed, judge(variant))
        error = _output_error(outputs, _outputs(variant, feeds, runtime))
        shares = (block.bytes / len(model), flops[block.name] / total)
        rows.append(Sensitivity(block.name, block.op, block.parameters, *shares, precision, loss, error))
        if progress:
            progress(
                (done + 1) / len(todo), f"{block.name} at {precision}: {loss.overlap:.1%} of the lists stay"
            )
    return rows


def block_flops(
    blocks: list[Block], weights: Mapping[str, tuple[int, ...]], ranges: Ranges
) -> dict[str, float]:
    """Counts each block's floating point operations a user (2 a multiply-add), from the calibrated shapes and
    those of the weights."""
    found = {}
    for block in blocks:
        known = block.inputs and block.inputs[0] in ranges and block.output in ranges
        shape = ranges[block.inputs[0]].shape if known else ()
        terms = shape[-1] if shape else 0
        if known and block.op == "Conv":
            terms = int(np.prod(weights[str(block.weight)][1:]))
        found[block.name] = 2.0 * float(np.prod(ranges[block.output].shape)) * terms if shape else 0.0
    return found


def shapes_of(proto: ModelProto) -> dict[str, tuple[int, ...]]:
    """Gives the shape of each constant."""
    return {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}


def aligned_products(
    blocks: list[Block], weights: Mapping[str, tuple[int, ...]], ranges: Ranges
) -> frozenset[str]:
    """Names the products whose sides are multiples of 16: tensor cores multiply 8 bits in such pieces only.

    A side that is not is padded by the runtime, or multiplied in 16 bits with conversions around it.
    """

    def sides(block: Block) -> tuple[int, ...]:
        if block.weight is not None:
            return weights[block.weight][:2]  # of a convolution, the channels
        return tuple(ranges[name].shape[-1] for name in (*block.inputs, block.output) if name in ranges)

    return frozenset(block.name for block in blocks if all(side % _PIECE == 0 for side in sides(block)))


def fp16_misfit(model: bytes, block: Block, ranges: Ranges, runtime: str) -> str:
    """Says why this block cannot be fp16; empty where it can."""
    try:
        quantize(model, {block.name: "fp16"}, ranges, runtime)
    except InvalidInput as error:
        return str(error)
    return ""


def _outputs(model: bytes, feeds: Mapping[str, Array], runtime: str) -> list[Array]:
    session = open_session(model, fuse=runtime != "tensorrt")
    return session.run(None, {i.name: feeds[i.name][:_ERROR_USERS] for i in session.get_inputs()})


def _output_error(wanted: list[Array], found: list[Array]) -> float:
    """Gives the worst output's error; infinite where it is not finite."""
    errors = [
        float(np.sqrt(np.mean((a - b) ** 2)) / max(float(a.std()), 1e-12))
        for a, b in zip(wanted, found, strict=True)
    ]
    return max((error if np.isfinite(error) else np.inf for error in errors), default=0.0)

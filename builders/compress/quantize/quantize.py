"""Writes an ONNX model that runs each of its blocks at a given precision."""

from __future__ import annotations

from collections.abc import Mapping

from builders.compress import graph
from builders.compress.graph import Block
from builders.compress.quantize import fp16, onnxruntime_graph, tensorrt_graph
from builders.compress.quantize.calibration import Ranges
from ensemble.errors import InvalidInput

PRECISIONS = {"onnxruntime": ("int8", "fp32"), "tensorrt": ("int8", "fp8", "fp16", "fp32")}  # smallest first
BITS = {"int8": 8, "fp8": 8, "fp16": 16, "fp32": 32}


def quantize(model: bytes, precisions: Mapping[str, str], ranges: Ranges, runtime: str) -> bytes:
    """Writes an fp32 model with each named block (graph.blocks) at its precision.

    Blocks not named stay fp32; inputs and outputs are the same.

    InvalidInput names an unknown block, runtime or precision, a block that cannot have it, and one whose fp16
    would overflow. The notes of the exporter (a tenth of a small model's bytes) are left out.
    """
    proto = graph.load(model)
    blocks = graph.blocks(proto)
    check_precisions(blocks, precisions, ranges, runtime)
    if runtime == "tensorrt":
        tensorrt_graph.retype(proto, {block: precisions.get(block.name, "fp32") for block in blocks}, ranges)
    else:
        onnxruntime_graph.to_int8(
            proto, [block for block in blocks if precisions.get(block.name) == "int8"], ranges
        )
    graph.sort(proto)
    graph.drop_unused(proto)
    graph.drop_notes(proto)
    if runtime == "tensorrt":
        fp16.saturate(proto, ranges)
    return graph.save(proto)


def check_precisions(
    blocks: list[Block], precisions: Mapping[str, str], ranges: Ranges, runtime: str
) -> None:
    """InvalidInput unless every name is a block's, and its precision one that the runtime has for such a
    block."""
    by_name = {block.name: block for block in blocks}
    for name, precision in precisions.items():
        if name not in by_name:
            raise InvalidInput(
                f"the model has no block {name} that could be {precision}; it has {', '.join(by_name)}"
            )
        possible = choices(by_name[name], runtime)
        if precision not in possible:
            raise InvalidInput(
                f"{name} ({by_name[name].op}) cannot be {precision} on {runtime}; it can be "
                f"{', '.join(possible)}"
            )
        lacking = [tensor for tensor in by_name[name].inputs if BITS[precision] == 8 and tensor not in ranges]
        if lacking:
            raise InvalidInput(f"{name} has no calibrated range for {lacking[0]}; calibrate this very model")


def choices(block: Block, runtime: str) -> tuple[str, ...]:
    """Precisions a block can have, smallest first: TensorRT gathers no 8-bit rows. InvalidInput for an
    unknown runtime."""
    if runtime not in PRECISIONS:
        raise InvalidInput(f"runtime {runtime} is unknown; known: {', '.join(PRECISIONS)}")
    known = PRECISIONS[runtime]
    return tuple(p for p in known if BITS[p] > 8) if block.op == "Gather" and runtime == "tensorrt" else known

"""Writes the typed ONNX that a strongly typed TensorRT network is made of: every tensor has its type.

8-bit blocks have Q/DQ before each activation (symmetric, one scale a tensor) and a DQ behind weights that are
stored as codes (int8: one scale an output channel; fp8 E4M3: one a tensor, Micikevicius et al. 2022); nothing
at the bias. What is not 8 bits runs in fp16, from cast to cast, except where the numbers demand fp32:
normalizations, softmax and sums, whatever was seen beyond fp16's range, and what reads a constant that a cast
would change (fp16.py). Nodes that may be either take the side on which fewer casts are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from builders.compress import graph
from builders.compress.graph import Block
from builders.compress.quantize.calibration import Range, Ranges
from builders.compress.quantize.fp16 import FP8_MAX, FP16_MAX, FP16_TINY, is_changed
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

_OPSET = 19  # the first with fp8
# Operations that lose nothing that matters in fp16 while their tensors fit; all others stay fp32.
_ARITHMETIC = (
    "Add",
    "Sub",
    "Mul",
    "Neg",
    "Max",
    "Min",
    "Clip",
    "Relu",
    "LeakyRelu",
    "Gelu",
    "Tanh",
    "Sigmoid",
    "MatMul",
    "Gemm",
    "Conv",
    "Cast",
    "Where",
)
_MOVES = (
    "Concat",
    "Reshape",
    "Transpose",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Expand",
    "Gather",
    "Tile",
    "Pad",
)
_EITHER = frozenset((*_ARITHMETIC, *_MOVES))


def retype(proto: ModelProto, precisions: Mapping[Block, str], ranges: Ranges) -> None:
    """Rewrites an fp32 graph for the blocks' precisions; inputs and outputs stay fp32. InvalidInput names a
    block fp16 does not fit."""
    _check_opset(proto)
    for block, precision in precisions.items():
        if precision == "fp16" and (why := _misfit(proto, block, ranges)):
            raise InvalidInput(
                f"{block.name} cannot be fp16: {why} (largest fp16: {FP16_MAX:.0f}); leave it at fp32"
            )
    _Typing(proto, precisions, ranges).write()


def _check_opset(proto: ModelProto) -> None:
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version < _OPSET:
            raise InvalidInput(
                f"the model has ONNX opset {opset.version}, typed engines need {_OPSET} or later; export it "
                "again"
            )


def _misfit(proto: ModelProto, block: Block, ranges: Ranges) -> str:
    """Says which of the block's tensors fp16 cannot hold; empty when it holds all."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    node = next(node for node in proto.graph.node if node.name == block.node)
    for name in (*node.input, *node.output):
        largest = _largest(name, constants, ranges)
        if not largest <= FP16_MAX:
            return f"{name} reaches {largest:.3g} on the calibration users"
        if _is_float(constants, name) and is_changed(graph.array(constants[name]), node.op_type):
            return f"{name} has nothing above {largest:.3g}, where fp16 has few digits or none"
    return ""


def _largest(name: str, constants: Mapping[str, TensorProto], ranges: Ranges) -> float:
    """Gives the largest |x| of a float tensor; 0 where nothing is known.

    That is of a constant's values, or as seen on the calibration users.
    """
    known = constants.get(name)
    if known is not None and known.data_type == TensorProto.FLOAT:
        return float(np.abs(graph.array(known)).max(initial=0))
    return ranges[name].amplitude if name in ranges else 0.0


def _is_float(constants: Mapping[str, TensorProto], name: str) -> bool:
    """Says whether `name` is a constant of fp32."""
    return name in constants and constants[name].data_type == TensorProto.FLOAT


class _Typing:
    """Holds the graph while its tensors get types."""

    def __init__(self, proto: ModelProto, precisions: Mapping[Block, str], ranges: Ranges) -> None:
        self.graph, self.ranges = proto.graph, ranges
        self.known = graph.index(proto)
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        self.floats |= {name for name, t in self.known.constants.items() if t.data_type == TensorProto.FLOAT}
        self.blocks = {block.node: (block, precision) for block, precision in precisions.items()}
        self.fits = {node.name: self._fits(node) for node in self.graph.node}
        self.types = self._decided()
        self.made: set[str] = set()

    def write(self) -> None:
        """Writes casts, constants and Q/DQ for the decided types."""
        nodes = list(self.graph.node)
        outputs = {o.name for o in self.graph.output}
        for node in nodes:
            block, precision = self.blocks.get(node.name, (None, "fp32"))
            kind = self.types.get(node.name)
            if kind is None:
                continue
            for place, name in enumerate(node.input):
                if name in self.floats:
                    node.input[place] = self._typed(name, kind)
            if node.op_type == "Cast" and kind == TensorProto.FLOAT16:
                self._cast_to(node, kind)
            if block is not None and precision in ("int8", "fp8"):
                self._eight_bits(node, block, precision, kind)
        for node in nodes:  # contract tensors stay fp32
            for place, name in enumerate(node.output):
                if (
                    name in outputs
                    and name in self.floats
                    and self.types.get(node.name) == TensorProto.FLOAT16
                ):
                    self._give_fp32(node, place, nodes)
        for node in nodes:  # last: until here types are known by the names that were
            node.name = self.blocks[node.name][0].name if node.name in self.blocks else node.name

    def _decided(self) -> dict[str, int]:
        """Decides the type of each node of floats: blocks as wanted, others where fewer casts are needed."""
        types: dict[str, int] = {}
        free = []
        any16 = any(precision != "fp32" for _, precision in self.blocks.values())
        for node in self.graph.node:
            if not self.floats.intersection(node.output):
                continue  # shapes and masks: read whatever there is
            asked = self.blocks[node.name][1] if node.name in self.blocks else None
            is16 = any16 and self.fits[node.name] and asked != "fp32" and self._has_scales(node, asked)
            types[node.name] = TensorProto.FLOAT16 if is16 else TensorProto.FLOAT
            if is16 and asked is None:
                free.append(node)
        for _ in range(len(free)):
            flipped = [
                node
                for node in free
                if types[node.name] == TensorProto.FLOAT16 and self._casts(node, types) > 0
            ]
            for node in flipped:
                types[node.name] = TensorProto.FLOAT
            if not flipped:
                break
        return types

    def _casts(self, node: NodeProto, types: Mapping[str, int]) -> int:
        """Casts around a node in fp16, less those around it in fp32."""
        sides = [
            self._maker_type(name, types)
            for name in node.input
            if name in self.floats and name not in self.known.constants
        ]
        for name in node.output:
            sides += [
                types[reader.name] for reader in self.known.readers.get(name, []) if reader.name in types
            ]
            sides += [TensorProto.FLOAT] if name in self.known.outputs else []
        return sum(1 if side == TensorProto.FLOAT else -1 for side in sides)

    def _maker_type(self, tensor: str, types: Mapping[str, int]) -> int:
        maker = self.known.makers.get(tensor)
        return types.get(maker.name, TensorProto.FLOAT) if maker is not None else TensorProto.FLOAT

    def _fits(self, node: NodeProto) -> bool:
        """Says whether fp16 holds all that the node reads and makes, and changes no constant of it."""
        constants, names = self.known.constants, (*node.input, *node.output)
        return (
            node.op_type in _EITHER
            and all(_largest(name, constants, self.ranges) <= FP16_MAX for name in names)
            and not any(
                _is_float(constants, name) and is_changed(graph.array(constants[name]), node.op_type)
                for name in node.input
            )
        )

    def _has_scales(self, node: NodeProto, precision: str | None) -> bool:
        """Says whether fp16 holds the scales of an 8-bit block: codes of one rounded up would lose digits.

        fp8 codes have an exponent of their own, which makes up for 6 bits.
        """
        if precision not in ("int8", "fp8"):
            return True
        block = self.blocks[node.name][0]
        least = FP16_TINY if precision == "int8" else FP16_TINY / 64
        fulls = [_full(self.ranges[name], precision) for name in block.inputs]
        if block.weight is not None:
            largest = _largest(block.weight, self.known.constants, self.ranges)
            fulls.append(largest / (127 if precision == "int8" else FP8_MAX))
        return all(full >= least for full in fulls if full)

    def _typed(self, tensor: str, kind: int) -> str:
        """Names the tensor in the wanted type, cast once for all who read it."""
        constant = self.known.constants.get(tensor)
        if constant is not None:
            return (
                tensor
                if kind == TensorProto.FLOAT
                else self._store(f"{tensor}_fp16", graph.array(constant).astype(np.float16))
            )
        if self._maker_type(tensor, self.types) == kind:
            return tensor
        return self._add(
            "Cast", [tensor], f"{tensor}_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}", to=kind
        )

    def _eight_bits(self, node: NodeProto, block: Block, precision: str, kind: int) -> None:
        """Puts Q/DQ before the block's activations, and codes and DQ in place of its weight."""
        for place, original in enumerate(block.inputs):
            node.input[place] = self._coded(node.input[place], original, precision, kind)
        if block.weight is not None:
            is_turned = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if block.op == "Conv" or is_turned else 1
            node.input[1] = self._coded_weight(block, precision, axis, kind)

    def _coded(self, tensor: str, original: str, precision: str, kind: int) -> str:
        found: Range = self.ranges[original]
        full = _full(found, precision)
        name = f"{tensor}_{precision}"
        scale = self._store(f"{name}_scale", _scale(np.asarray(full), kind))
        zero = self._store(f"{name}_zero_point", np.zeros((), _code_type(precision)))
        codes = self._add("QuantizeLinear", [tensor, scale, zero], f"{name}_codes")
        return self._add("DequantizeLinear", [codes, scale, zero], f"{name}_values")

    def _coded_weight(self, block: Block, precision: str, axis: int, kind: int) -> str:
        assert block.weight is not None
        weight = graph.array(self.known.constants[block.weight]).astype(np.float64)
        if precision == "int8":
            others = tuple(at for at in range(weight.ndim) if at != axis)
            scale = _scale(np.abs(weight).max(others) / 127, kind)
            steps = np.expand_dims(scale.astype(np.float64), others)
            codes = np.rint(weight / steps).clip(-127, 127).astype(np.int8)
        else:
            scale = _scale(np.asarray(np.abs(weight).max() / FP8_MAX), kind)
            codes = (
                (weight / float(scale))
                .clip(-FP8_MAX, FP8_MAX)
                .astype(np.float32)
                .astype(ml_dtypes.float8_e4m3fn)
            )
        name = f"{block.name}.weight_{precision}"
        inputs = [self._store(name, codes), self._store(f"{name}_scale", scale)]
        inputs.append(self._store(f"{name}_zero_point", np.zeros(scale.shape, codes.dtype)))
        return self._add(
            "DequantizeLinear", inputs, f"{name}_values", **({"axis": axis} if scale.ndim else {})
        )

    def _cast_to(self, node: NodeProto, kind: int) -> None:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = kind

    def _give_fp32(self, node: NodeProto, place: int, nodes: list[NodeProto]) -> None:
        """Casts an fp16 node's tensor that the graph gives away, under the tensor's own name."""
        name = node.output[place]
        node.output[place] = f"{name}_inside"
        for reader in (*nodes, *self.graph.node):
            for at, read in enumerate(reader.input):
                if read == name:
                    reader.input[at] = f"{name}_inside"
        self._add("Cast", [f"{name}_inside"], name, to=TensorProto.FLOAT)

    def _store(self, name: str, value: Array) -> str:
        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
            )
        return name

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        if output not in self.made:
            self.made.add(output)
            self.graph.node.append(helper.make_node(op, inputs, [output], f"{output}_{op}", **attributes))
        return output


def _full(seen: Range, precision: str) -> float:
    """Gives the scale of an activation's codes."""
    return seen.clip / 127 if precision == "int8" else seen.amplitude / FP8_MAX


def _scale(full: Array, kind: int) -> Array:
    """Scales in the block's own type, none so small that fp16 rounds it away."""
    return (
        np.maximum(full, FP16_TINY).astype(np.float16)
        if kind == TensorProto.FLOAT16
        else np.maximum(full, 1e-12).astype(np.float32)
    )


def _code_type(precision: str) -> np.dtype:
    return np.dtype(np.int8) if precision == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)

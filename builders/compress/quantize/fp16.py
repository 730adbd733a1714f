"""Keeps what is computed in fp16 finite and true: constants that a cast would change, tensors that overflow.

A constant is changed by a cast when it loses more than fp16's rounding: 1e-12 becomes 0, 1e5 infinite. The
second half bounds every fp16 tensor for whatever the inputs may be, by interval arithmetic (Moore 1966), and
cuts off (Clip) those that could leave fp16's range: an outlier then gives a large number, and never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from builders.compress import graph
from builders.compress.quantize.calibration import Ranges
from ensemble.arrays import Array

FP16_MAX = 65504.0
FP16_TINY = 2.0**-14  # the smallest number that fp16 holds with all its digits
FP8_MAX = 448.0
_ROUNDING = 2.0**-10  # of a number: twice what rounding to 11 digits loses
_LIMITS = frozenset(("Clip", "Max", "Min", "Div"))  # each of their constants counts, however small it is
# An input this many times larger than any that the calibration users had is cut off.
_MARGIN = 16.0
_SAME = frozenset((
    "Cast", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand",
    "Gather", "Tile", "Relu", "Neg", "Gelu", "Abs", "ReduceMean", "ReduceMax", "Split", "Dropout",
))  # fmt: skip
_UP_TO_1 = frozenset(("Softmax", "Sigmoid", "Tanh", "Erf", "Sin", "Cos"))


def is_changed(values: Array, op: str) -> bool:
    """Says whether a cast to fp16 changes `values`, any axes, as an input of `op`, by more than rounding.

    What is summed or multiplied is held against the largest of the values, a limit or a divisor against
    itself.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lost = np.abs(values.astype(np.float16).astype(np.float64) - values)
    whole = np.abs(values)
    allowed = _ROUNDING * (whole if op in _LIMITS else whole.max(initial=0))
    return not bool((lost <= allowed).all())


def saturate(proto: ModelProto, ranges: Ranges) -> None:
    """Cuts off, in place, every fp16 tensor of a typed graph that some input could drive out of fp16's range.

    The nodes must be in order (graph.sort).
    """
    _Saturation(proto, ranges).write()


class _Saturation:
    """Holds the graph and the bound of |x| of every tensor while it is walked."""

    def __init__(self, proto: ModelProto, ranges: Ranges) -> None:
        self.graph, self.ranges = proto.graph, ranges
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        self.weights = {t.name: np.abs(graph.array(t).astype(np.float64)) for t in self.graph.initializer}
        self.bound = {name: float(value.max(initial=0)) for name, value in self.weights.items()}
        self.bound |= {name: 1.0 for name, kind in self.types.items() if kind == TensorProto.BOOL}
        self.least: dict[str, float] = {}  # of what a Clip keeps above 0

    def write(self) -> None:
        """Walks the nodes in order and puts a Clip behind each that needs one, and at float inputs."""
        if TensorProto.FLOAT16 not in self.types.values():
            return
        nodes = self._inputs()
        for node in list(self.graph.node):
            nodes.append(node)
            found = self._bound(node)
            for place, name in enumerate(node.output):
                self.bound[name] = 1.0 if self.types.get(name) == TensorProto.BOOL else found
                if self.types.get(name) == TensorProto.FLOAT16 and not found <= FP16_MAX:
                    node.output[place] = f"{name}_unbounded"
                    nodes.append(self._clip(node.output[place], name, np.dtype(np.float16)))
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _inputs(self) -> list[NodeProto]:
        """Makes the Clips of the float inputs, and lets all nodes read what they give."""
        floats = {v.name for v in self.graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        for node in self.graph.node:
            node.input[:] = [f"{name}_saturated" if name in floats else name for name in node.input]
        for name in sorted(floats):
            self.dims[f"{name}_saturated"] = self.dims[name]
        return [self._clip(name, f"{name}_saturated", np.dtype(np.float32), name) for name in sorted(floats)]

    def _clip(self, source: str, target: str, dtype: np.dtype, tensor: str = "") -> NodeProto:
        """Makes the Clip of `source` at _MARGIN times what was seen of `tensor`, or of `target`."""
        name = tensor or target
        seen = next(
            (self.ranges[n].amplitude for n in (name, name.removesuffix("_fp16")) if n in self.ranges), 0.0
        )
        limit = min(FP16_MAX, float(np.float16(min(FP16_MAX, _MARGIN * seen))) or FP16_MAX)
        ends = [f"end_{end:g}_{dtype.name}" for end in (-limit, limit)]
        for name, end in zip(ends, (-limit, limit), strict=True):
            if name not in self.bound:
                self.graph.initializer.append(numpy_helper.from_array(np.array(end, dtype), name))
            self.bound[name] = limit
        self.bound[target] = limit
        return helper.make_node("Clip", [source, *ends], [target], f"{target}_clip")

    def _bound(self, node: NodeProto) -> float:
        """Bounds |x| of what the node makes; infinite where nothing is known."""
        op, sides = node.op_type, [self.bound.get(name, np.inf) for name in node.input if name]
        if op in _UP_TO_1:
            return 1.0
        if op == "Clip" and len(sides) == 2 and self._is_positive(node.input[1]):
            self.least[node.output[0]] = sides[1]
        if op in ("Div", "ReduceSum", "ReduceL2"):
            return self._quotient(node, sides) if op == "Div" else sides[0] * self._terms(node)
        rule = _RULES.get(op)
        if rule is not None:
            return rule(sides)
        if op in _SAME:
            return sides[0]
        if op in ("MatMul", "Gemm", "Conv"):
            return self._product(node, sides)
        if op == "LayerNormalization":
            width = self._width(node.input[1], 0)
            return width**0.5 * sides[1] + (sides[2] if len(sides) > 2 else 0.0)
        return self._dequantized(node) if op == "DequantizeLinear" else np.inf

    def _is_positive(self, name: str) -> bool:
        """Says whether `name` is a constant above 0."""
        constant = next((t for t in self.graph.initializer if t.name == name), None)
        return constant is not None and bool((graph.array(constant) > 0).all())

    def _quotient(self, node: NodeProto, sides: list[float]) -> float:
        """Bounds a quotient, where its divisor was kept above 0."""
        return sides[0] / self.least[node.input[1]] if node.input[1] in self.least else np.inf

    def _terms(self, node: NodeProto) -> float:
        """Counts what a reduction adds up; infinite where an axis of it varies."""
        dims, axes = self.dims.get(node.input[0], []), self._axes(node)
        return float(np.prod([dims[axis] or np.inf for axis in axes])) if dims and axes else np.inf

    def _axes(self, node: NodeProto) -> list[int]:
        """Gives the axes of a reduction, as its constant says."""
        constant = next((t for t in self.graph.initializer if t.name in node.input[1:]), None)
        return [] if constant is None else graph.array(constant).ravel().tolist()

    def _product(self, node: NodeProto, sides: list[float]) -> float:
        """Bounds a product by the largest sum of |weight|, or by its length where both sides vary."""
        weight = self.weights.get(node.input[1])
        if weight is not None and node.op_type == "Conv":
            return sides[0] * float(weight.sum(tuple(range(1, weight.ndim))).max()) + sum(sides[2:])
        if weight is None or weight.ndim != 2:
            return sides[0] * sides[1] * self._width(node.input[0], -1)
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        return sides[0] * float(weight.sum(1 if turned else 0).max()) + (sides[2] if len(sides) > 2 else 0.0)

    def _dequantized(self, node: NodeProto) -> float:
        """Bounds what codes stand for; codes of a weight become known values."""
        codes, scale = self.weights.get(node.input[0]), self.weights[node.input[1]]
        if codes is None:
            return float(scale.max()) * FP8_MAX  # 128 would do for int8
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if place == axis % codes.ndim else 1 for place in range(codes.ndim)]
        values = codes * (scale.reshape(shape) if scale.ndim else scale)
        self.weights[node.output[0]] = values
        return float(values.max(initial=0))

    def _width(self, name: str, axis: int) -> float:
        dims = self.weights[name].shape if name in self.weights else self.dims.get(name, ())
        return float(dims[axis] or np.inf) if dims else np.inf


def _clipped(sides: list[float]) -> float:
    """Bounds a Clip: by its ends if it has both, else by the larger of what comes and its end."""
    return min(sides[0], max(sides[1:])) if len(sides) == 3 else max(sides)


_RULES: Mapping[str, Callable[[list[float]], float]] = {
    "Add": sum,
    "Sub": sum,
    "Mul": lambda sides: 0.0 if 0.0 in sides else sides[0] * sides[1],
    "Log": lambda _: 104.0,  # of whatever fp32 holds above 0
    "Where": lambda sides: max(sides[1:]),
    "Concat": max,
    "Max": max,
    "Min": max,
    "Clip": _clipped,
}

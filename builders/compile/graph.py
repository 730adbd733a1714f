"""Prepares ONNX for TensorRT: tells its types and whether weights are 2:4, repairs what parsers refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_TYPE_ATTRIBUTES = {("Cast", "to"), ("QuantizeLinear", "output_dtype")}
_SPARSE_FROM = 16  # rows and columns: smaller weights hold zeros by chance
Spelt = tuple[list[onnx.NodeProto], dict[str, float]]  # an operator's nodes, and the constants they take
OLD_OPSET = 17  # the newest that TensorRT 8.5 reads


def read_model(data: bytes, where: str) -> onnx.ModelProto:
    """Reads the model in `data`; ReleaseError when it is cut short, or points to a file outside."""
    try:
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's own share no base but Exception
        raise ReleaseError(
            f"{where} is not a whole ONNX model: {str(error).strip().splitlines()[0]}",
            "build the release again",
        ) from None
    outside = [
        tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL
    ]
    if outside:
        raise ReleaseError(
            f"{where}: {outside[0]} lies in a file outside the model, which could be any file",
            "save it as one file",
        )
    return model


def precision(model: onnx.ModelProto) -> str:
    """Names the types that the graph computes in, such as "fp16+fp32+int8".

    They are those of its weights, its casts and its quantized nodes.
    """
    found = {tensor.data_type for tensor in model.graph.initializer} | {
        value.type.tensor_type.elem_type for value in model.graph.input
    }
    found |= {
        a.i for node in model.graph.node for a in node.attribute if (node.op_type, a.name) in _TYPE_ATTRIBUTES
    }
    found |= {
        a.t.data_type
        for node in model.graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    }
    return "+".join(sorted(_NAMES[kind] for kind in found if kind in _NAMES)) or "fp32"


def check_constants(model: onnx.ModelProto, where: str) -> list[str]:
    """Gives a line for each constant that is infinite in fp16; ReleaseError for one that is NaN.

    Both may be a cast's doing, but an infinite one may also mask logits on purpose.
    """
    readers = {name: node.name for node in model.graph.node for name in node.input}
    notes = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            continue
        values, place = numpy_helper.to_array(tensor), readers.get(tensor.name, "?")
        if np.isnan(values).any():
            raise ReleaseError(
                f"{where}: {tensor.name}, which node {place} reads, is NaN", "build the release again"
            )
        if tensor.data_type == TensorProto.FLOAT16 and np.isinf(values).any():
            notes.append(f"node {place} reads {tensor.name}, which is infinite in fp16: was it so in fp32?")
    return notes


def drop_int8_activations(model: onnx.ModelProto) -> int:
    """Leaves int8 to weights, in place: what reads rounded activations reads them unrounded; gives how many.

    For a runtime whose int8 is of weights only, which would round activations and multiply in fp16 all the
    same.
    """
    graph = model.graph
    zeros = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8}
    made = {node.output[0]: node for node in graph.node}
    unrounded = {}
    for node in graph.node:
        coder = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if coder is not None and coder.op_type == "QuantizeLinear" and coder.input[2] in zeros:
            unrounded[node.output[0]] = coder.input[0]
    for node in graph.node:
        node.input[:] = [unrounded.get(name, name) for name in node.input]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in reversed(list(graph.node)):  # a coder is read by its decoder alone, which goes first
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.output[0] not in read:
            graph.node.remove(node)
            read = {name for other in graph.node for name in other.input} | {v.name for v in graph.output}
    return len(unrounded)


def is_sparse(model: onnx.ModelProto) -> bool:
    """Says whether a weight has at most two of every four neighbours along the summed axis.

    That is what sparse tensor cores skip.

    NVIDIA, "Accelerating Sparse Deep Neural Networks" (2021), https://arxiv.org/abs/2104.08378.
    """
    return any(
        _is_two_of_four(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2
    )


def _is_two_of_four(weight: Array) -> bool:
    if weight.dtype.kind not in "fi" or min(weight.shape) < _SPARSE_FROM:
        return False
    ways = (w for w in (weight, weight.T) if w.shape[1] % 4 == 0)
    return any(((w.reshape(len(w), -1, 4) != 0).sum(2) <= 2).all() and bool(w.any()) for w in ways)


def use_every_input(model: onnx.ModelProto) -> list[str]:
    """Adds 0 times each unread input to the first output, in place; returns their names.

    A shop without user features leaves `user_codes` unread, and TensorRT drops what nothing reads: the plan's
    inputs would no longer be the contract's. clip(sum, 0, 0) is 0 for every input, and the builder does not
    fold it.
    """
    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    unread = [value for value in graph.input if value.name not in read]
    if not unread:
        return []
    answer = graph.output[0]
    rank, hidden = len(answer.type.tensor_type.shape.dim), f"{answer.name}_alone"
    for node in graph.node:
        node.output[:] = [hidden if name == answer.name else name for name in node.output]
        node.input[:] = [hidden if name == answer.name else name for name in node.input]
    graph.initializer.extend(_constants(rank))
    total = hidden
    for value in unread:
        after = answer.name if value is unread[-1] else f"{value.name}_added"
        graph.node.extend(_nothing_from(value.name, rank))
        graph.node.append(
            helper.make_node("Add", [total, f"{value.name}_nothing"], [after], f"{value.name}_add")
        )
        total = after
    return [value.name for value in unread]


def _constants(rank: int) -> list[TensorProto]:
    axes = np.arange(2, rank, dtype=np.int64)
    return [
        numpy_helper.from_array(np.zeros((), np.float32), "unread_zero"),
        numpy_helper.from_array(np.array([1], np.int64), "unread_sum_axes"),
        numpy_helper.from_array(axes, "unread_more_axes"),
    ]


def _nothing_from(name: str, rank: int) -> list[onnx.NodeProto]:
    """Makes [B, 1, …] float32 zeros of `rank` axes from [B, …] of any type."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Flatten", [], {"axis": 1}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["unread_sum_axes"], {"keepdims": 1}),
        ("Clip", ["unread_zero", "unread_zero"], {}),
        *([("Unsqueeze", ["unread_more_axes"], {})] if rank > 2 else []),
    ]
    nodes, source = [], name
    for place, (op, more, attributes) in enumerate(steps):
        target = f"{name}_nothing" if place == len(steps) - 1 else f"{name}_unread_{op}"
        nodes.append(helper.make_node(op, [source, *more], [target], f"{name}_unread_{op}", **attributes))
        source = target
    return nodes


def to_old_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Writes the model for TensorRT 8.5's parser: opset 17 in fp32, with what it does not know spelt out.

    Its networks are weakly typed: it takes fp32 graphs with Q/DQ, and chooses fp16 and int8 by flags.
    ReleaseError names the operator that cannot be brought down: such a model wants TensorRT 10.12 or newer.
    """
    model = _widened(model)
    model = _expanded(model, "Gelu", _gelu)  # Gelu is opset 20; the converter knows no way down
    try:
        model = version_converter.convert_version(model, OLD_OPSET)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ReleaseError(
            f"this model cannot be brought down to opset {OLD_OPSET} for TensorRT 8.5: {reason}",
            "use TensorRT 10.12 or newer",
        ) from None
    for node in (
        model.graph.node
    ):  # the converter forgets that, of all reductions, only ReduceSum had this attribute before opset 18
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    model = _expanded(model, "LayerNormalization", _layer_normalization)
    _spell_shapes(model)
    model.ir_version = 8
    return model


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copies the model with fp32 wherever it has fp16: weights, constants, scales, casts."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        _widen(tensor)
    for node in copy.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name) == ("Cast", "to") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                _widen(attribute.t)
    return copy


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _spell_shapes(model: onnx.ModelProto) -> None:
    """Writes Shape of some axes as Shape of all and a Slice, in place: TensorRT 8.5 reads over `start` and
    `end`, without a word."""
    nodes: list[onnx.NodeProto] = []
    for place, node in enumerate(model.graph.node):
        nodes.append(node)
        limits = {a.name: a.i for a in node.attribute}
        if node.op_type != "Shape" or not limits:
            continue
        prefix, (out,) = f"Shape_{place}", node.output
        ends = {"start": limits.get("start", 0), "end": limits.get("end", np.iinfo(np.int64).max)}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.array([value], np.int64), f"{prefix}_{name}")
            for name, value in ends.items()
        )
        del node.attribute[:]
        node.output[0] = f"{prefix}_all"
        inputs = [node.output[0], f"{prefix}_start", f"{prefix}_end"]
        nodes.append(helper.make_node("Slice", inputs, [out], f"{prefix}_Slice"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _expanded(
    model: onnx.ModelProto, op: str, spelt: Callable[[onnx.NodeProto, str], Spelt]
) -> onnx.ModelProto:
    """Copies the model, with every `op` replaced by the nodes and constants that `spelt` gives for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for place, node in enumerate(model.graph.node):
        if node.op_type != op:
            copy.graph.node.append(node)
            continue
        nodes, constants = spelt(node, f"{op}_{place}")
        copy.graph.node.extend(nodes)
        copy.graph.initializer.extend(
            numpy_helper.from_array(np.array(value, np.float32), f"{op}_{place}_{name}")
            for name, value in constants.items()
        )
    return copy


def _gelu(node: onnx.NodeProto, prefix: str) -> Spelt:
    """Spells x / 2 * (1 + erf(x / sqrt 2)), or its tanh form.

    Hendrycks and Gimpel (2016), https://arxiv.org/abs/1606.08415.
    """
    exact = not any(a.s == b"tanh" for a in node.attribute if a.name == "approximate")
    x, (out,) = node.input[0], node.output
    chain = (
        [("Mul", x, "scale"), ("Erf",)]
        if exact
        else [
            ("Mul", x, x),
            ("Mul", None, x),
            ("Mul", None, "cube"),
            ("Add", None, x),
            ("Mul", None, "scale"),
            ("Tanh",),
        ]
    )
    chain += [("Add", None, "one"), ("Mul", None, x), ("Mul", None, "half")]
    constants = {"scale": math.sqrt(0.5) if exact else math.sqrt(2 / math.pi), "one": 1.0, "half": 0.5} | (
        {} if exact else {"cube": 0.044715}
    )
    return _chain(chain, prefix, out, constants), constants


def _layer_normalization(node: onnx.NodeProto, prefix: str) -> Spelt:
    """Spells (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Ba et al. (2016), https://arxiv.org/abs/1607.06450.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("axis", -1) != -1:
        raise ReleaseError(
            f"{node.name}: LayerNormalization over axes from {attributes['axis']} on cannot be spelt out for "
            "TensorRT 8.5",
            "only the last axis",
        )
    x, scale, bias, (out, *_) = (
        node.input[0],
        node.input[1],
        node.input[2] if len(node.input) > 2 else "",
        node.output,
    )
    mean, away, square, variance = (f"{prefix}_{name}" for name in ("mean", "away", "square", "variance"))
    nodes = [
        helper.make_node("ReduceMean", [x], [mean], mean, axes=[-1], keepdims=1),
        helper.make_node("Sub", [x, mean], [away], away),
        helper.make_node("Mul", [away, away], [square], square),
        helper.make_node("ReduceMean", [square], [variance], variance, axes=[-1], keepdims=1),
    ]
    chain = [
        ("Add", variance, "epsilon"),
        ("Sqrt",),
        ("Div", away, None),
        ("Mul", None, scale),
        *([("Add", None, bias)] if bias else []),
    ]
    constants = {"epsilon": float(attributes.get("epsilon", 1e-5))}
    return nodes + _chain(chain, prefix, out, constants), constants


def _chain(
    steps: list[tuple[str | None, ...]], prefix: str, out: str, constants: dict[str, float]
) -> list[onnx.NodeProto]:
    """Nodes in a row: None stands for the one before's output, a constant's name for that constant."""
    nodes, last = [], ""
    for place, (op, *names) in enumerate(steps):
        inputs = [
            last if name is None else f"{prefix}_{name}" if name in constants else name
            for name in (names or [None])
        ]
        last = out if place == len(steps) - 1 else f"{prefix}_{place}"
        nodes.append(helper.make_node(str(op), inputs, [last], f"{prefix}_{place}_{op}"))
    return nodes

"""Writes int8 blocks for ONNX Runtime on a CPU.

A linear block becomes Q/DQ around a two-axis Gemm, which ONNX Runtime fuses to QGemm with bias and ReLU
inside; codes stay uint8 from block to block and through concatenations, so no float copy of an activation is
written that nobody reads. A convolution becomes a QLinearConv, which has codes on both sides. Tables become
int8 rows with one scale each.

Scheme: Jacob et al. CVPR 2018 (affine uint8 activations, symmetric int8 weights per output channel, int32
bias). Parts of a concatenation keep a scale each, moved into the weights' rows before those are rounded: the
move of scales from activations to weights of Xiao et al. ICML 2023 (SmoothQuant). Axes: K inputs and N
outputs of a block, V rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from builders.compress import graph
from builders.compress.graph import Block
from builders.compress.quantize.calibration import Range, Ranges
from ensemble.arrays import Array

_MAX_CODE = 255


@dataclass(frozen=True)
class Part:
    """Columns of a block's input that share one affine code: x = scale * (code - zero), where x = factor *
    tensor."""

    tensor: str
    columns: int
    scale: float
    zero: int
    factor: float = 1.0


def to_int8(proto: ModelProto, blocks: list[Block], ranges: Ranges) -> None:
    """Rewrites the given blocks of the graph, in its order."""
    rewrite = _Rewrite(proto, ranges)
    for block in blocks:
        kind = (
            rewrite.table
            if block.op == "Gather"
            else rewrite.convolution
            if block.op == "Conv"
            else rewrite.product
            if block.weight is None
            else rewrite.linear
        )
        kind(block)


def joined_by(maker: NodeProto | None, tensor: str, ranges: Ranges) -> list[str]:
    """Names what a tensor's maker joins along its last axis, if it is a concatenation of known ranges."""
    if (
        maker is None
        or maker.op_type != "Concat"
        or maker.attribute[0].i not in (-1, len(ranges[tensor].shape))
    ):
        return []
    return list(maker.input) if all(name in ranges for name in maker.input) else []


def affine(found: Range) -> tuple[float, int]:
    """Gives (scale, zero) of uint8 codes from the range's low to its high; 0.0 has a code of its own."""
    scale = float(np.float32((found.high - found.low) / _MAX_CODE or 1.0))
    return scale, int(np.clip(np.rint(-found.low / scale), 0, _MAX_CODE))


def rounded_weight(weight: Array, least: Array) -> tuple[Array, Array]:
    """Rounds a weight [K, N] to (symmetric int8 codes [K, N], scales [N], no smaller than `least` [N])."""
    scales = np.maximum(np.abs(weight).max(0) / 127, least).astype(np.float32)
    return np.rint(weight / scales).clip(-127, 127).astype(np.int8), scales


def folded(parts: list[Part], weight: Array, bias: Array) -> tuple[float, int, Array, Array, Array]:
    """Folds all parts of an input into one code.

    Gives its scale, its zero, weight codes [K, N] int8, their scales [N], bias [N].

    With many parts the code has zero 0; what the parts' own zeros add is a constant of each output, and goes
    into the bias.
    """
    scale = max(part.scale for part in parts)
    rows = np.repeat([part.scale / scale for part in parts], [part.columns for part in parts])
    # the bias must fit into int32
    codes, steps = rounded_weight(weight * rows[:, None], np.abs(bias) / (scale * 2**30) + 1e-12)
    if len(parts) == 1:
        return scale, parts[0].zero, codes, steps, bias
    zeros = np.repeat([float(part.zero) for part in parts], [part.columns for part in parts])
    return scale, 0, codes, steps, bias - scale * steps * (zeros @ codes)


class _Rewrite:
    """Holds the graph while it is being rewritten, and what has been written already."""

    def __init__(self, proto: ModelProto, ranges: Ranges) -> None:
        self.graph, self.ranges = proto.graph, ranges
        self.known, self.dims = graph.index(proto), graph.dims(proto)
        self.nodes = {node.name: node for node in proto.graph.node}
        self.flat: dict[str, str] = {}  # tensor [.., C] that a rewritten block makes -> the same as [rows, C]
        self.code_names: dict[tuple[float, int], str] = {}
        self.made: set[str] = set()  # tensors written here, by names that say what they are

    def linear(self, block: Block) -> None:
        """Rewrites MatMul or Gemm (+ bias) (+ ReLU) as Q, DQ, Gemm (+ ReLU) over rows."""
        node = self.nodes[block.node]
        bias_name, add = graph.bias_of(node, self.known)
        weight = graph.array(self.known.constants[node.input[1]]).astype(np.float64)
        weight = weight.T if any(a.name == "transB" and a.i for a in node.attribute) else weight
        bias = (
            np.broadcast_to(graph.array(self.known.constants[bias_name]).ravel(), weight.shape[1])
            if bias_name
            else np.zeros(weight.shape[1])
        )
        source = block.inputs[0]
        parts = self._parts(source)
        scale, zero, codes, steps, bias = folded(parts, weight, bias)
        inputs = [
            self._decoded(self._rows(parts, source), scale, zero),
            self._constant(f"{block.name}.weight_int8", codes, steps, 1),
            self._bias(block, bias, scale * steps),
        ]
        relu = self.known.only_reader((add or node).output[0], "Relu")
        old = [n for n in (node, add, relu) if n is not None]
        for gone in old:
            self.graph.node.remove(gone)
        self._write_linear(
            block.name, inputs, old[-1].output[0], relu is not None, parts[0].tensor, weight.shape[1]
        )

    def _write_linear(
        self, name: str, inputs: list[str], result: str, relu: bool, like: str, columns: int
    ) -> None:
        """Writes the Gemm and, for those who read the result as floats, all the axes it had and its ReLU.

        In this order: a ReLU right behind the Gemm would be fused with it as floats. Readers of codes need
        none, as codes of what is never negative begin at 0.
        """
        self.flat[result] = self._add("Gemm", inputs, f"{result}_rows", name)
        whole = self._add(
            "Reshape", [self.flat[result], self._shape(like, columns)], f"{result}_raw" if relu else result
        )
        if relu:
            self._add("Relu", [whole], result)

    def convolution(self, block: Block) -> None:
        """Puts Q and DQ before a Conv and behind its ReLU or Clip: ONNX Runtime fuses the five.

        Whoever reads the result reads what its codes stand for, else it would be written as floats, too.
        """
        node, source = self.nodes[block.node], block.inputs[0]
        bias_name, _ = graph.bias_of(node, self.known)
        weight = graph.array(self.known.constants[node.input[1]]).astype(np.float64)
        channels = len(weight)
        bias = graph.array(self.known.constants[bias_name]) if bias_name else np.zeros(channels)
        scale, zero = affine(self.ranges[source])
        least = np.abs(bias) / (scale * 2**30) + 1e-12  # the bias must fit into int32
        codes, steps = rounded_weight(weight.reshape(channels, -1).T, least)
        node.input[:] = [
            self._decoded(self._codes(source, scale, zero), scale, zero),
            self._constant(f"{block.name}.weight_int8", codes.T.reshape(weight.shape), steps, 0),
            self._bias(block, bias, scale * steps),
        ]
        result = node.output[0]
        limit = self.known.only_reader(result, "Relu") or self.known.only_reader(result, "Clip")
        self._read_as_codes((limit or node).output[0])

    def _read_as_codes(self, tensor: str) -> None:
        """Lets all nodes that read a float tensor read what its codes stand for."""
        if tensor in self.known.outputs:
            return
        scale, zero = affine(self.ranges[tensor])
        decoded = self._decoded(self._codes(tensor, scale, zero), scale, zero)
        for reader in self.known.readers.get(tensor, []):
            reader.input[:] = [decoded if name == tensor else name for name in reader.input]

    def product(self, block: Block) -> None:
        """Rewrites a MatMul of two activations: Q and DQ before each."""
        node = self.nodes[block.node]
        for place, tensor in enumerate(node.input):
            scale, zero = affine(self.ranges[tensor])
            node.input[place] = self._decoded(self._codes(tensor, scale, zero), scale, zero)

    def table(self, block: Block) -> None:
        """Rows gathered as int8 codes and one float16 scale each, multiplied in float32."""
        node = self.nodes[block.node]
        table = graph.array(self.known.constants[node.input[0]]).astype(np.float64)
        scales = np.maximum(np.abs(table).max(1, keepdims=True) / 127, 1e-7).astype(np.float16)
        codes = np.rint(table / scales.astype(np.float64)).clip(-127, 127).astype(np.int8)
        name, rows, out = f"{block.name}.rows_int8", node.input[1], node.output[0]
        self._store(name, codes)
        self._store(f"{name}_scale", scales)
        self.graph.node.remove(node)
        pairs = [
            (self._add("Gather", [table_name, rows], f"{out}_{kind}"), kind)
            for table_name, kind in ((name, "codes"), (f"{name}_scale", "scales"))
        ]
        self._add(
            "Mul",
            [self._add("Cast", [tensor], f"{tensor}_fp32", to=1) for tensor, _ in pairs],
            out,
            block.name,
        )

    def _parts(self, tensor: str) -> list[Part]:
        """Splits a concatenation along the last axis into its inputs; a constant factor joins the scale."""
        maker = self.known.makers.get(tensor)
        inputs = list(maker.input) if maker is not None else []
        if joined := joined_by(maker, tensor, self.ranges):
            return [part for name in joined for part in self._parts(name)]
        scale, zero = affine(self.ranges[tensor])
        columns = self.ranges[tensor].shape[-1]
        if maker is not None and maker.op_type == "Relu" and zero == 0 and tensor not in self.flat:
            return [Part(inputs[0], columns, scale, zero)]  # codes begin at 0, which is what the ReLU does
        factor = self._factor(inputs[1]) if maker is not None and maker.op_type == "Mul" else None
        if factor is not None and inputs[0] in self.ranges and inputs[0] not in self.flat:
            return [Part(inputs[0], columns, scale, zero, factor)]
        return [Part(tensor, columns, scale, zero)]

    def _factor(self, name: str) -> float | None:
        """Gives the value of a constant that is one positive number."""
        constant = self.known.constants.get(name)
        value = graph.array(constant) if constant is not None else np.zeros(0)
        return float(value.ravel()[0]) if value.size == 1 and value.ravel()[0] > 0 else None

    def _rows(self, parts: list[Part], source: str) -> str:
        """Puts the parts' codes side by side, [rows, K] uint8."""
        if len(parts) == 1:
            part = parts[0]
            rows = self.flat.get(part.tensor)
            codes = self._codes(rows or part.tensor, part.scale / part.factor, part.zero)
            return codes if rows else self._flattened(codes, part.tensor, part.columns)
        joined = self._add("Concat", [self._whole(part) for part in parts], f"{source}_codes", axis=-1)
        return self._flattened(joined, source, sum(part.columns for part in parts))

    def _whole(self, part: Part) -> str:
        """Gives one part's codes with all its axes."""
        rows = self.flat.get(part.tensor)
        codes = self._codes(rows or part.tensor, part.scale / part.factor, part.zero)
        return (
            self._add("Reshape", [codes, self._shape(part.tensor, part.columns)], f"{codes}_whole")
            if rows
            else codes
        )

    def _flattened(self, codes: str, like: str, columns: int) -> str:
        if self._is_flat(like):
            return codes
        self._store(f"rows_of_{columns}", np.array([-1, columns]))
        return self._add("Reshape", [codes, f"rows_of_{columns}"], f"{codes}_rows")

    def _shape(self, like: str, columns: int) -> str:
        """Gives the shape of the tensor [.., C] with `columns` for C.

        It is a constant where only the first axis varies, and shared where axes have names.
        """
        axes = self.dims.get(like, ())[:-1]
        if axes and all(isinstance(axis, int) for axis in axes[1:]):
            name = "_".join(("shape_batch", *map(str, axes[1:]), str(columns)))
            self._store(name, np.array([-1, *axes[1:], columns]))
            return name
        lead = "_".join(map(str, axes)) if axes and all(axes) else like
        self._add("Shape", [like], f"{lead}_lead", start=0, end=-1)
        self._store(f"columns_{columns}", np.array([columns]))
        return self._add("Concat", [f"{lead}_lead", f"columns_{columns}"], f"{lead}_shape_{columns}", axis=0)

    def _codes(self, tensor: str, scale: float, zero: int) -> str:
        """Gives uint8 codes of a float tensor, shared by all readers that agree on scale and zero."""
        name, ends = self._code(scale, zero)
        return self._add("QuantizeLinear", [tensor, *ends], f"{tensor}_{name}")

    def _decoded(self, codes: str, scale: float, zero: int) -> str:
        name, ends = self._code(scale, zero)
        return self._add("DequantizeLinear", [codes, *ends], f"{codes}_{name}_values")

    def _code(self, scale: float, zero: int) -> tuple[str, list[str]]:
        """Gives (a short name of the affine code, the names of its scale and zero)."""
        name = self.code_names.setdefault((np.float32(scale).item(), zero), f"q{len(self.code_names)}")
        ends = [f"{name}_scale", f"{name}_zero_point"]
        self._store(ends[0], np.float32(scale))
        self._store(ends[1], np.uint8(zero))
        return name, ends

    def _constant(self, name: str, codes: Array, scales: Array, axis: int) -> str:
        """Stores a constant as integers with one scale along `axis`."""
        self._store(name, codes)
        self._store(f"{name}_scale", scales)
        # without it ONNX Runtime does not fuse the Gemm
        self._store(f"{name}_zero_point", np.zeros(scales.shape, codes.dtype))
        return self._add(
            "DequantizeLinear", [name, f"{name}_scale", f"{name}_zero_point"], f"{name}_decoded", axis=axis
        )

    def _bias(self, block: Block, bias: Array, steps: Array) -> str:
        """Stores a bias [N] as int32 codes, of the products' own scales [N]."""
        codes = np.rint(bias / steps).astype(np.int32)
        return self._constant(f"{block.name}.bias_int32", codes, steps.astype(np.float32), 0)

    def _store(self, name: str, value: Array | np.generic) -> None:
        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    def _add(self, op: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        """Adds a node, unless its output is there already."""
        if output not in self.made:
            self.made.add(output)
            node: NodeProto = helper.make_node(op, inputs, [output], name or f"{output}_{op}", **attributes)
            self.graph.node.append(node)
        return output

    def _is_flat(self, tensor: str) -> bool:
        return len(self.ranges[tensor].shape) == 1

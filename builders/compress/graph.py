"""Reads and writes ONNX graphs for compression: safely, with blocks by readable names, and their bytes.

A *block* is what a precision can be chosen for: a MatMul or Gemm (with its bias and ReLU, if they follow), a
convolution, and a table that rows are gathered from. All else in a graph follows its neighbours.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ensemble.arrays import Array
from ensemble.errors import InvalidInput

SMALL = 256  # elements; a constant below it is a shape, an axis or a scalar, not a table
# the exporter's note of the module a node came from
_SCOPES, _CLASSES = (
    "pkg.torch.onnx.name_scopes",
    "pkg.torch.onnx.class_hierarchy",
)


@dataclass(frozen=True)
class Block:
    """Describes a MatMul, Gemm, Conv or table of the graph. Tensors are named as in the graph."""

    name: str
    op: str  # "MatMul", "Gemm", "Conv" or "Gather"
    node: str  # the graph node's own name, unique
    inputs: tuple[
        str, ...
    ]  # float activations it reads: one, or two for a MatMul of activations, none for a table
    output: str  # of the node itself
    weight: str | None  # the constant's initializer, None for a MatMul of activations
    parameters: int  # elements of weight and bias
    bytes: int  # of the same, as stored in this model


@dataclass
class Index:
    """Tells who makes and who reads each tensor of a graph."""

    constants: dict[str, TensorProto] = field(default_factory=dict)
    makers: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, list[NodeProto]] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)

    def only_reader(self, tensor: str, op: str) -> NodeProto | None:
        """Gives the one node that reads `tensor`, if it is an `op`; None where the graph gives the tensor."""
        readers = self.readers.get(tensor, [])
        return (
            readers[0]
            if len(readers) == 1 and readers[0].op_type == op and tensor not in self.outputs
            else None
        )


def load(model: bytes, name: str = "the model") -> ModelProto:
    """Reads a serialized model, and gives its nodes unique names.

    InvalidInput when it is cut short or points to other files.
    """
    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise InvalidInput(
            f"{name} is not an ONNX model or is cut short ({type(error).__name__}); export it again"
        ) from None
    if not proto.graph.node:
        raise InvalidInput(f"{name} has no nodes: it is not an ONNX model or is cut short; export it again")
    for tensor in _tensors(proto.graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InvalidInput(
                f"{name}: {tensor.name} lies in another file (external data); save the model as one file"
            )
    constants_from_nodes(proto)
    _name_nodes(proto.graph)
    return proto


def save(proto: ModelProto) -> bytes:
    """Writes one file, the same bytes for the same graph."""
    return proto.SerializeToString(deterministic=True)


def index(proto: ModelProto) -> Index:
    """Makers and readers of all tensors."""
    found = Index({i.name: i for i in proto.graph.initializer}, outputs={o.name for o in proto.graph.output})
    for node in proto.graph.node:
        found.makers |= dict.fromkeys(node.output, node)
        for name in dict.fromkeys(node.input):
            found.readers.setdefault(name, []).append(node)
    return found


def blocks(proto: ModelProto) -> list[Block]:
    """Lists the blocks in the order of the graph.

    Their names are those of the modules they were exported from, where known.
    """
    known = index(proto)
    nodes = [node for node in proto.graph.node if _is_block(node, known)]
    found = [_block(node, known) for node in nodes]
    return [Block(name, *block) for name, block in zip(_names(nodes), found, strict=True)]


def bias_of(node: NodeProto, known: Index) -> tuple[str | None, NodeProto | None]:
    """Gives (the initializer added to a MatMul's or Gemm's output, the Add that does it).

    The Add is None for a Gemm or a Conv, which has it inside.
    """
    if node.op_type in ("Gemm", "Conv"):
        return (node.input[2] if len(node.input) > 2 else None), None
    add = known.only_reader(node.output[0], "Add")
    other = next((name for name in add.input if name != node.output[0]), None) if add else None
    weight = known.constants.get(node.input[1])
    fits = (
        other in known.constants
        and weight is not None
        and list(known.constants[other].dims) == [weight.dims[-1]]
    )
    return (other, add) if fits else (None, None)


def sizes(model: bytes) -> dict[str, int]:
    """Bytes of every constant by name, and of all that is not a constant as "(graph)"."""
    proto = load(model)
    found = {tensor.name: tensor_bytes(tensor) for tensor in proto.graph.initializer}
    return {**found, "(graph)": len(model) - sum(found.values())}


def tensor_bytes(tensor: TensorProto) -> int:
    """Counts the bytes of a constant's elements."""
    return (
        int(np.prod(tensor.dims, dtype=np.int64))
        * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )


def parameters(model: bytes) -> int:
    """Elements of all constants that are not shapes, axes or scalars of the graph."""
    floats = (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.FLOAT8E4M3FN,
    )
    return sum(
        int(np.prod(t.dims, dtype=np.int64))
        for t in load(model).graph.initializer
        if t.data_type in floats and not t.name.endswith(NOT_TRAINED)
    )


NOT_TRAINED = ("_scale", "_zero_point")  # endings of what quantize.py adds


def array(tensor: TensorProto) -> Array:
    """Gives a constant's values."""
    return np.asarray(numpy_helper.to_array(tensor))


def constants_from_nodes(proto: ModelProto) -> None:
    """Turns Constant nodes into initializers.

    InvalidInput for control flow, whose inner graphs no precision is chosen for.
    """
    for node in list(proto.graph.node):
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for attribute in node.attribute
        ):
            raise InvalidInput(
                f"{node.name} ({node.op_type}) has a graph inside and cannot be quantized; export the model "
                "without control flow"
            )
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            proto.graph.initializer.append(tensor)
            proto.graph.node.remove(node)


def dims(proto: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Axes of each tensor as far as they are known: lengths, and names of those that vary ("" where they have
    none)."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    return {
        v.name: tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param for d in v.type.tensor_type.shape.dim
        )
        for v in (*inferred.input, *inferred.value_info, *inferred.output)
        if v.type.tensor_type.HasField("shape")
    }


def drop_unused(proto: ModelProto) -> None:
    """Removes nodes and constants that no output needs."""
    graph = proto.graph
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def drop_notes(proto: ModelProto) -> None:
    """Removes what the exporter noted for people, and shapes written for the old graph."""
    del proto.graph.value_info[:]
    proto.ClearField("metadata_props")
    for part in (
        proto.graph,
        *proto.graph.node,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def sort(proto: ModelProto) -> None:
    """Nodes in an order in which each comes after those it reads, otherwise as they were."""
    graph = proto.graph
    ready = {i.name for i in graph.initializer} | {i.name for i in graph.input} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if ready.issuperset(node.input):
                ordered.append(node)
                ready |= set(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise InvalidInput(f"{later[0].name} reads a tensor that no node makes; export the model again")
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Gives every constant of a graph, those in attributes and subgraphs too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _name_nodes(graph: GraphProto) -> None:
    """Gives every node a unique name; those that are there and unique stay."""
    times = Counter(node.name for node in graph.node)
    for place, node in enumerate(graph.node):
        if not node.name or times[node.name] > 1:
            node.name = f"{node.op_type}_{place}"


def _is_block(node: NodeProto, known: Index) -> bool:
    if node.op_type == "MatMul":
        weight = known.constants.get(node.input[1])
        return node.input[0] not in known.constants and (weight is None or len(weight.dims) == 2)
    if node.op_type == "Conv":
        return node.input[1] in known.constants and all(name in known.constants for name in node.input[2:])
    if node.op_type == "Gemm":
        plain = all(
            a.name == "transB"
            or (a.name in ("alpha", "beta") and a.f == 1.0)
            or (a.name == "transA" and not a.i)
            for a in node.attribute
        )
        return plain and node.input[0] not in known.constants and node.input[1] in known.constants
    table = known.constants.get(node.input[0]) if node.op_type == "Gather" else None
    if (
        table is None
        or table.data_type != TensorProto.FLOAT
        or len(table.dims) != 2
        or int(np.prod(table.dims)) < SMALL
    ):
        return False
    return len(known.readers[table.name]) == 1 and all(a.name != "axis" or a.i == 0 for a in node.attribute)


def _block(node: NodeProto, known: Index) -> tuple[str, str, tuple[str, ...], str, str | None, int, int]:
    """Gives Block's fields after its name."""
    inputs: tuple[str, ...]
    if node.op_type == "Gather":
        inputs, weight, bias = (), node.input[0], None
    elif node.input[1] in known.constants:
        inputs, weight, bias = (node.input[0],), node.input[1], bias_of(node, known)[0]
    else:
        return node.op_type, node.name, (node.input[0], node.input[1]), node.output[0], None, 0, 0
    tensors = [known.constants[name] for name in (weight, bias) if name in known.constants]
    elements = sum(int(np.prod(tensor.dims)) for tensor in tensors)
    return (
        node.op_type,
        node.name,
        inputs,
        node.output[0],
        weight,
        elements,
        sum(tensor_bytes(tensor) for tensor in tensors),
    )


def _names(nodes: list[NodeProto]) -> list[str]:
    """Names blocks by their module's path, "module.operation" where one has several, else by their node."""
    scopes = [_scopes(node) for node in nodes]
    times = Counter(module for module, _ in scopes if module)
    wanted = [
        module if module and times[module] == 1 else f"{module}.{operation}" if module else node.name
        for node, (module, operation) in zip(nodes, scopes, strict=True)
    ]
    twice = Counter(wanted)
    return [name if twice[name] == 1 else node.name for name, node in zip(wanted, nodes, strict=True)]


def _scopes(node: NodeProto) -> tuple[str, str]:
    """Gives (path of the innermost torch module, name of the operation in it), as the exporter noted them.

    Both are empty where it left no note.
    """
    notes = {prop.key: prop.value for prop in node.metadata_props}
    try:
        path = ast.literal_eval(notes.get(_SCOPES, "[]"))
        return (str(path[-2]), str(path[-1])) if len(path) > 1 else ("", "")
    except (ValueError, SyntaxError):
        return "", ""

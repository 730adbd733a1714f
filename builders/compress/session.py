"""Opens ONNX models on the CPU for everything that measures or judges them."""

from __future__ import annotations

import onnx

from builders.compress import graph
from ensemble.engines.onnx import OnnxEngine

_SHORT_FLOATS = {
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E5M2,
}


def open_onnx(model: bytes, name: str = "the model") -> OnnxEngine:
    """Opens a serialized model on the CPU, one thread; InvalidInput if it cannot be.

    Graphs with 8- or 16-bit floats are run as they are written: beyond basic optimization, onnxruntime 1.31
    does not run fp8, and crashes on some fp16 graphs.
    """
    return OnnxEngine(model, fuse=not _has_short_floats(graph.load(model, name)))


def _has_short_floats(model: onnx.ModelProto) -> bool:
    """Says whether a weight has 8- or 16-bit floats, or a node casts to them."""
    casts = {
        a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"
    }
    return bool(_SHORT_FLOATS & ({tensor.data_type for tensor in model.graph.initializer} | casts))

"""Runs ONNX models on the CPU for everything that measures or judges them."""

from __future__ import annotations

import onnx
import onnxruntime as ort

from builders.compress import graph
from ensemble.arrays import Tensors
from ensemble.engines.onnx import session_options
from ensemble.errors import InvalidInput


class OnnxSession:
    """A serialized ONNX model on the CPU, one thread. Graphs with 8- or 16-bit floats are run as they are
    written: beyond basic optimization, onnxruntime 1.31 does not run fp8, and crashes on some fp16 graphs."""

    def __init__(self, model: bytes, name: str = "the model") -> None:
        self._session = open_session(model, plain=_has_short_floats(graph.load(model, name)))
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]

    def run(self, feeds: Tensors) -> Tensors:
        """Arrays by name in, arrays by name out."""
        wanted = {name: array for name, array in feeds.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, wanted), strict=True))


def _has_short_floats(model: onnx.ModelProto) -> bool:
    short = {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.FLOAT8E4M3FN,
        onnx.TensorProto.FLOAT8E5M2,
    }
    casts = {
        a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"
    }
    return bool(short & ({tensor.data_type for tensor in model.graph.initializer} | casts))


def open_session(model: bytes, *, plain: bool = False) -> ort.InferenceSession:
    """One thread on the CPU; `plain`: only the optimizations that keep each node's own rounding (fp16 and fp8
    graphs need it)."""
    options = session_options(fuse=not plain)
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        raise InvalidInput(f"onnxruntime does not open the model: {str(error).splitlines()[0]}") from None

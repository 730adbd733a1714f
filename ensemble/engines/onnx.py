"""ONNX Runtime on the CPU, one thread an engine: parallelism comes from instances, and idle threads must not spin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ensemble.errors import ReleaseError

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}


class OnnxEngine:
    """One InferenceSession. The file is read as bytes, so external data, which could point anywhere, is never followed."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
            raise ReleaseError(f"cannot open {path}: {str(error).splitlines()[0]}") from None
        self.inputs = [_described(node) for node in self._session.get_inputs()]
        self.outputs = [_described(node) for node in self._session.get_outputs()]
        self._output_names = [name for name, _, _ in self.outputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by name in, arrays by name out."""
        return dict(zip(self._output_names, self._session.run(self._output_names, feeds), strict=True))


def _described(node: ort.NodeArg) -> tuple[str, str, tuple[int | None, ...]]:
    dims = tuple(d if isinstance(d, int) else None for d in node.shape[1:])
    return node.name, _DTYPES.get(node.type, node.type), dims

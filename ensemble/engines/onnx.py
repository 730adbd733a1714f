"""ONNX Runtime, on the CPU unless a GPU is asked for. One thread an engine: parallelism comes from instances,
and idle threads must not spin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ensemble.errors import ReleaseError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxEngine:
    """One InferenceSession. The file is read as bytes, so external data, which could point anywhere, is never
    followed."""

    def __init__(self, path: Path, threads: int, provider: str = CPU, *, fuse: bool = True) -> None:
        """ReleaseError if `provider` does not become active. fuse=False: basic optimizations only, all that
        fp16 and fp8 graphs bear on the CPU."""
        options = session_options(threads, fuse=fuse)
        _check_provider(path, provider, ort.get_available_providers())
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
            raise ReleaseError(f"cannot open {path}: {str(error).splitlines()[0]}") from None
        # one that does not start is dropped in silence
        _check_provider(path, provider, self._session.get_providers())
        self.inputs = [_described(node) for node in self._session.get_inputs()]
        self.outputs = [_described(node) for node in self._session.get_outputs()]
        self._output_names = [name for name, _, _ in self.outputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by name in, arrays by name out."""
        return dict(zip(self._output_names, self._session.run(self._output_names, feeds), strict=True))


def session_options(threads: int = 1, *, fuse: bool = True) -> ort.SessionOptions:
    """Gives the options of every session of ours; `fuse` as in OnnxEngine."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI an x86 CPU adds pairs of 8-bit products in 16 bits, which overflow: six times the error on
    # such a machine, and not a word. This takes the exact kernels there, and changes nothing elsewhere.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


def _check_provider(path: Path, provider: str, active: list[str]) -> None:
    if provider not in active:
        raise ReleaseError(
            f"{path}: {provider} was asked for, active are {', '.join(active)}; install onnxruntime-gpu on "
            "a node with a GPU, or use the CPU"
        )


def _described(node: ort.NodeArg) -> tuple[str, str, tuple[int | None, ...]]:
    dims = tuple(d if isinstance(d, int) else None for d in node.shape[1:])
    return node.name, _DTYPES.get(node.type, node.type), dims

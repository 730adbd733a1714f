"""Runs an ONNX model with ONNX Runtime's CUDA provider, as one CUDA graph a batch size.

Launching a ranker's hundred small kernels one by one takes longer than running them. A CUDA graph launches
them all at once: it is captured from the first run of a size, on tensors that stay where they are. So a batch
is padded to the next of a few sizes, each with tensors of its own. (CUDA Graphs: CUDA C++ Programming Guide,
section 3.2.8.7; ONNX Runtime: provider option enable_cuda_graph, run option gpu_graph_id.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ensemble.arrays import Tensors
from ensemble.engines.onnx import CPU, CUDA, OnnxEngine, described, open_session
from ensemble.errors import PeregrineError
from ensemble.progress import say

_DEVICES = {CUDA: "cuda", CPU: "cpu"}


class CudaOnnxEngine:
    """Holds one opened ONNX model on the GPU; `inputs` and `outputs` are an Engine's."""

    def __init__(self, model: Path | bytes, threads: int = 1, provider: str = CUDA) -> None:
        """Opens `model` as one whose runs can be captured; errors as in open_session, also where they
        cannot. `provider` is the CPU's in tests of all but the capture."""
        options = {"enable_cuda_graph": "1"} if provider == CUDA else {}
        self._session = open_session(model, threads, provider, provider_options=options)
        self._device = _DEVICES[provider]
        self.inputs, self.outputs = described(self._session)
        self._captured: dict[tuple[int, ...], _Captured] = {}

    def run(self, feeds: Tensors) -> Tensors:
        """Gives the outputs by name; of `feeds`, what the model does not take is left out."""
        taken = {name: feeds[name] for name, _, _ in self.inputs}
        batch = len(taken[self.inputs[0][0]])
        rows = 1 << (batch - 1).bit_length()
        shapes = tuple(size for array in taken.values() for size in array.shape[1:])
        captured = self._captured.get((rows, *shapes))
        if captured is None:
            captured = _Captured(self._session, len(self._captured) + 1, rows, taken, self._device)
            self._captured[(rows, *shapes)] = captured
        return captured.run(taken, batch)


class _Captured:
    """Holds the tensors of one batch size, on the host and on the device, and the run that is captured."""

    def __init__(
        self, session: ort.InferenceSession, number: int, rows: int, feeds: Tensors, device: str
    ) -> None:
        self._session, self._binding, self._options = session, session.io_binding(), ort.RunOptions()
        if device != _DEVICES[CPU]:
            self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._host = {name: np.zeros((rows, *a.shape[1:]), a.dtype) for name, a in feeds.items()}
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(host, device, 0) for name, host in self._host.items()
        }
        sizes: dict[str | int | None, int] = {}  # what the model's named axes are here
        for node in session.get_inputs():
            sizes.update(zip(node.shape, self._host[node.name].shape, strict=True))
            self._binding.bind_ortvalue_input(node.name, self._inputs[node.name])
        self._outputs: dict[str, ort.OrtValue] = {}
        for node, (name, dtype, _) in zip(session.get_outputs(), described(session)[1], strict=True):
            shape = [sizes.get(axis, axis) for axis in node.shape]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype).type, device, 0)
            self._outputs[name] = value
            self._binding.bind_ortvalue_output(name, value)

    def run(self, feeds: Tensors, batch: int) -> Tensors:
        """Copies `batch` rows in, runs all rows of this size, and copies `batch` rows out."""
        for name, host in self._host.items():
            host[:batch] = feeds[name]
            self._inputs[name].update_inplace(host)
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: value.numpy()[:batch].copy() for name, value in self._outputs.items()}


def open_cuda(model: Path, threads: int = 1) -> CudaOnnxEngine | OnnxEngine:
    """Opens a model on the GPU: with captured runs where it can be captured, else node by node."""
    try:
        return CudaOnnxEngine(model, threads)
    except PeregrineError as error:  # a node that CUDA does not have runs on the CPU: nothing is captured
        engine = OnnxEngine(model, threads, CUDA)
        say(f"WARNING: {model} runs on the GPU node by node, not as a graph: {error}")
        return engine

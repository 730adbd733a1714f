"""Runs ONNX models with ONNX Runtime, on the CPU unless a GPU is asked for.

An engine has one thread: parallelism comes from instances, and idle threads must not spin.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import onnxruntime as ort

from ensemble.arrays import Tensors
from ensemble.errors import InvalidInput, ReleaseError

Described = tuple[
    str, str, tuple[int | None, ...]
]  # a tensor's name, numpy dtype name, sizes after the batch
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CPU_FACTS = Path("/proc/cpuinfo")
_VNNI = frozenset(("avx512_vnni", "avx_vnni"))
# Rounds the biases of 8-bit convolutions by a way that overflows where they are fp16.
_NOT_AS_WRITTEN = ["WeightBiasQuantization"]
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxEngine:
    """Holds one opened ONNX model; `inputs` and `outputs` say what it takes and gives, as Engine wants."""

    def __init__(
        self, model: Path | bytes, threads: int = 1, provider: str = CPU, *, fuse: bool = True
    ) -> None:
        """Opens `model`, a file or its bytes; errors and `fuse` as in open_session."""
        self._session = open_session(model, threads, provider, fuse=fuse)
        self.inputs, self.outputs = described(self._session)
        self._input_names = frozenset(name for name, _, _ in self.inputs)
        self._output_names = [name for name, _, _ in self.outputs]

    def run(self, feeds: Tensors) -> Tensors:
        """Gives the outputs by name; of `feeds`, what the model does not take is left out."""
        wanted = {name: array for name, array in feeds.items() if name in self._input_names}
        return dict(zip(self._output_names, self._session.run(self._output_names, wanted), strict=True))


def described(session: ort.InferenceSession) -> tuple[list[Described], list[Described]]:
    """Lists a session's inputs and outputs as Engine wants them."""
    return [_described(node) for node in session.get_inputs()], [
        _described(node) for node in session.get_outputs()
    ]


def open_session(
    model: Path | bytes,
    threads: int = 1,
    provider: str = CPU,
    *,
    fuse: bool = True,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Opens `model`, a file or its bytes; a file is read first, so that external data is never followed.

    fuse=False leaves out all but basic optimizations: each node then rounds as it is written, and fp16 and
    fp8 graphs run on the CPU. Raises ReleaseError if a file cannot be opened or `provider` does not become
    active, InvalidInput if bytes cannot be opened.
    """
    name, error_type = (str(model), ReleaseError) if isinstance(model, Path) else ("the model", InvalidInput)
    _check_provider(name, provider, ort.get_available_providers())
    options = _session_options(threads, provider, fuse)
    try:
        data = model.read_bytes() if isinstance(model, Path) else model
        session = ort.InferenceSession(
            data,
            options,
            providers=[(provider, dict(provider_options or {}))],
            disabled_optimizers=None if fuse else _NOT_AS_WRITTEN,
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no base but Exception
        raise error_type(f"onnxruntime cannot open {name}: {str(error).splitlines()[0]}") from None
    _check_provider(name, provider, session.get_providers())  # One that does not start is dropped in silence.
    return session


def _session_options(threads: int, provider: str, fuse: bool) -> ort.SessionOptions:
    """Gives the options of every session of ours."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI an x86 CPU adds pairs of 8-bit products in 16 bits, which overflow: six times the error on
    # such a machine, and not a word. This takes the exact kernels; with VNNI all are, and these take twice as
    # long.
    if not adds_exactly(CPU_FACTS):
        options.add_session_config_entry("session.x64quantprecision", "1")
    # What fails is raised; only why CUDA did not start stands in the log alone.
    options.log_severity_level = 4 if provider == CPU else 3
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options


@lru_cache(maxsize=4)
def adds_exactly(cpu_facts: Path) -> bool:
    """Says whether a CPU adds 8-bit products in 32 bits (VNNI), by what Linux says of it; False where nothing
    can be read."""
    try:
        first = cpu_facts.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return False
    return not _VNNI.isdisjoint(first.split())


def _check_provider(name: str, provider: str, active: list[str]) -> None:
    if provider not in active:
        raise ReleaseError(
            f"{name}: {provider} was asked for, active are {', '.join(active)}",
            "install onnxruntime-gpu on a node with a GPU, or use the CPU",
        )


def _described(node: ort.NodeArg) -> Described:
    """Gives a tensor's name, numpy dtype name, and sizes without the batch; None where a size varies."""
    dims = tuple(d if isinstance(d, int) else None for d in node.shape[1:])
    return node.name, _DTYPES.get(node.type, node.type), dims

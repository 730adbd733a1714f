"""Runs a plan of either flavour as an Engine: numpy in, numpy out, or tensors that stay on the GPU (DLPack).

It uses the API that TensorRT 8.5 to 11 and TensorRT for RTX share: named tensors, set_input_shape,
set_tensor_address, execute_async_v3.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.engines.cuda import Gpu, gpu_facts
from ensemble.engines.dlpack import CUDA, Borrowed, DeviceTensor
from ensemble.engines.flavors import MODULES, RTX, TENSORRT, TITLES, sm_refusal
from ensemble.engines.plans import MANIFEST, Node, Plan, read_plan
from ensemble.errors import ReleaseError

Described = tuple[str, str, tuple[int | None, ...]]
# Not trt.nptype: that of 8.5 asks for np.bool, which numpy has not had since 1.24.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
_LIBRARIES = tuple(f"libnvinfer.so.{major}" for major in (11, 10, 8))
NOT_INSTALLED = {
    TENSORRT: (
        "TensorRT is not installed here",
        "plans are built and run in the serving image (tritonserver:26.09-py3 brings it) on a GPU node",
    ),
    RTX: ("TensorRT for RTX is not installed here", "pip install 'peregrine-recommender[rtx]'"),
}
_KEPT_LINES = 200  # of what TensorRT logs


def import_tensorrt(flavor: str = TENSORRT) -> Any:
    """Imports a flavour's module; ReleaseError where it is not installed.

    The RTX wheels load their own libraries, so that no search path need name them.
    """
    try:
        return importlib.import_module(MODULES[flavor])
    except ImportError as error:
        if getattr(error, "name", None) == MODULES[flavor]:
            raise ReleaseError(*NOT_INSTALLED[flavor]) from None
        raise ReleaseError(
            f"{TITLES[flavor]} is installed, but cannot be loaded: {error}", "install it again, both wheels"
        ) from None


def this_node(flavor: str = TENSORRT) -> Node:
    """Says what this machine runs plans of a flavour with.

    ReleaseError names what is missing: the GPU, one that the flavour knows, or the library.
    """
    gpu, sm, cuda = gpu_facts()
    if why := sm_refusal(flavor, sm):
        raise ReleaseError(why, f"this node has {gpu}; use --flavor tensorrt, or ONNX Runtime")
    return Node(gpu, sm, tensorrt_version(flavor), cuda, flavor)


def tensorrt_version(flavor: str = TENSORRT) -> str:
    """Gives the version of a flavour, such as "10.16.1": of the library that Triton's backend loads.

    Where there is none on the search path, and for RTX, it is the Python package's.
    """
    library = _library_version() if flavor == TENSORRT else ""
    return library or _short(import_tensorrt(flavor).__version__)


def check_bindings(flavor: str = TENSORRT) -> Any:
    """Imports a flavour's module; ReleaseError unless it has the version of the library that Triton loads."""
    trt, library = import_tensorrt(flavor), _library_version() if flavor == TENSORRT else ""
    found = _short(trt.__version__)
    if library and library != found:
        raise ReleaseError(
            f"Python's tensorrt is {found}, the libnvinfer that Triton loads is {library}: plans of one do "
            "not open in the other",
            f"pip install tensorrt-cu13-bindings=={library}.* (of your CUDA), or the image's own",
        )
    return trt


def _library_version() -> str:
    """Gives the version of the libnvinfer on the search path; empty where there is none."""
    for name in _LIBRARIES:
        try:
            number = ctypes.CDLL(name).getInferLibVersion()
        except (OSError, AttributeError):
            continue
        base = 10_000 if number >= 100_000 else 1000  # 101601 is 10.16.1, 8503 is 8.5.3
        return f"{number // base}.{number % base // 100}.{number % 100}"
    return ""


def _short(version: str) -> str:
    return ".".join(version.split(".")[:3])


@functools.cache
def logger(trt: Any) -> Any:
    """Gives the module's logger, which keeps the last warnings and errors, to be told with what failed.

    One a process: TensorRT writes to the first that it was given, whichever is passed later.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
            self.count = 0  # of all lines so far

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message.strip())
                self.count += 1

        def since(self, count: int) -> list[str]:
            """Gives the lines after the first `count`, as far as they are kept."""
            return list(self.lines)[-(self.count - count) :] if self.count > count else []

        def last_line(self) -> str:
            """Gives the last warning or error, for the error that is raised."""
            return self.lines[-1].splitlines()[0] if self.lines else "TensorRT says no more"

    return Log()


def start(kind: Any, log: Any) -> Any:
    """Makes a trt.Builder or trt.Runtime; ReleaseError if CUDA does not start.

    TensorRT itself then raises a TypeError without a reason.
    """
    try:
        return kind(log)
    except TypeError:
        raise ReleaseError(
            f"TensorRT does not start: {log.last_line()}", "does `nvidia-smi` show the GPU?"
        ) from None


class TensorRTEngine:
    """Holds one plan with one context and buffers for its largest batch; one caller at a time."""

    def __init__(self, path: Path) -> None:
        plan = _checked(path)
        trt = check_bindings(plan.key.flavor)
        self._log, self._gpu = logger(trt), Gpu()
        self._runtime = start(trt.Runtime, self._log)
        if plan.key.portable:
            # A version-compatible plan carries its own small runtime; its digest was checked
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        kernels = _KernelCache(trt, self._engine, plan) if plan.key.flavor == RTX and self._engine else None
        self._context: Any = None
        if self._engine is not None:
            self._context = self._engine.create_execution_context(*([kernels.config] if kernels else []))
        if self._context is None:
            raise ReleaseError(
                f"cannot open {path}: {self._log.last_line()}",
                "build it again on this node: `peregrine compile`",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        taken = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._dtypes = {name: np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name]) for name in names}
        self._most = {name: tuple(self._engine.get_tensor_profile_shape(name, 0)[2]) for name in taken}
        self.max_batch = min(shape[0] for shape in self._most.values())
        self._dims = self._fixed_dims(names)
        self.inputs = [self._described(name) for name in taken]
        self.outputs = [self._described(name) for name in names if name not in taken]
        self._buffers = {name: self._gpu.allocate(self._bytes(name, self.max_batch)) for name in names}
        if kernels is not None:
            zeros = {n: np.zeros((1, *self._dims[n]), self._dtypes[n]) for n in taken}
            self.run(zeros)  # compiles the kernels
            kernels.save()

    def run(self, feeds: Mapping[str, Any]) -> Tensors:
        """Turns arrays, or GPU tensors with __dlpack__, by name into arrays by name."""
        answer = {
            name: np.empty(shape, self._dtypes[name]) for name, shape in self._answer_shapes(feeds).items()
        }
        held = self._launch(feeds, self._buffers)
        for name, array in answer.items():
            self._gpu.download(self._buffers[name], array)
        self._gpu.synchronize()
        del held  # what the GPU read until now
        return answer

    def run_on_gpu(self, feeds: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        """Runs as run() does, but leaves the outputs on the GPU, in memory of their own.

        The next step takes them by __dlpack__.
        """
        self._gpu.enter()
        tensors = {
            name: DeviceTensor(
                self._gpu.allocate(self._bytes(name, shape[0])), shape, self._dtypes[name], self._gpu.free
            )
            for name, shape in self._answer_shapes(feeds).items()
        }
        held = self._launch(feeds, {name: tensor.address for name, tensor in tensors.items()})
        self._gpu.synchronize()
        del held
        return tensors

    def time_ms(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        """Gives the GPU time of each of `repeats` runs on the same feeds, copies not counted.

        CUDA events stand around execute_async_v3.
        """
        self._answer_shapes(feeds)
        held = self._launch(feeds, self._buffers)
        times = []
        for _ in range(repeats):
            start = self._gpu.event()
            self._execute()
            times.append(self._gpu.elapsed_ms(start, self._gpu.event()))
        del held
        return times

    def _launch(self, feeds: Mapping[str, Any], outputs: Mapping[str, int]) -> list[Any]:
        """Puts the inputs' copies and one run into the stream; gives what must live until the stream is
        through."""
        self._gpu.enter()
        held = []
        for name, _, _ in self.inputs:
            shape = (int(feeds[name].shape[0]), *self._dims[name])
            address, source = self._placed(name, feeds[name], shape)
            held.append(source)
            self._context.set_input_shape(name, shape)
            self._context.set_tensor_address(name, address)
        for name, _, _ in self.outputs:
            self._context.set_tensor_address(name, outputs[name])
        self._execute()
        return held

    def _execute(self) -> None:
        """Puts one run into the stream; ReleaseError if TensorRT refuses."""
        if not self._context.execute_async_v3(self._gpu.stream):
            raise ReleaseError(f"TensorRT could not run the plan: {self._log.last_line()}")

    def _placed(self, name: str, value: Any, shape: tuple[int, ...]) -> tuple[int, Any]:
        """Gives where the input is on the GPU, and what must live as long.

        That is its owner's memory if it is there already; else it is copied into our buffer.
        """
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value)
        else:
            borrowed = Borrowed(value, self._gpu.stream)
            self._check(name, borrowed, shape)
            if borrowed.device == CUDA:
                return borrowed.address, (borrowed, value)
            array = borrowed.array()
        self._check(name, array, shape)
        self._gpu.upload(array, self._buffers[name])
        return self._buffers[name], (array, value)

    def _check(self, name: str, given: Array | Borrowed, shape: tuple[int, ...]) -> None:
        """Raises ReleaseError for a wrong dtype or shape.

        TensorRT reads whatever lies at an address: that would be a wrong answer, not an error.
        """
        if (given.dtype, given.shape) != (self._dtypes[name], shape):
            raise ReleaseError(
                f"{name}: the plan takes {self._dtypes[name]} {list(shape)}, got {given.dtype} "
                f"{list(given.shape)}"
            )

    def _answer_shapes(self, feeds: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Gives the outputs' shapes for these feeds; ReleaseError if the plan does not take such a batch."""
        missing = [name for name, _, _ in self.inputs if name not in feeds]
        if missing:
            raise ReleaseError(f"the plan takes {', '.join(missing)}, which was not given")
        rows = {int(feeds[name].shape[0]) for name, _, _ in self.inputs}
        if len(rows) != 1 or not 1 <= min(rows) <= self.max_batch:
            raise ReleaseError(
                f"inputs of {sorted(rows)} rows: the plan takes one batch of 1 to {self.max_batch}"
            )
        return {name: (min(rows), *self._dims[name]) for name, _, _ in self.outputs}

    def _fixed_dims(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Gives every tensor's sizes without the batch.

        The profile fixes them, whatever axes the ONNX model left open.
        """
        for name, shape in self._most.items():
            self._context.set_input_shape(name, shape)
        return {
            name: tuple(self._most.get(name) or self._context.get_tensor_shape(name))[1:] for name in names
        }

    def _bytes(self, name: str, rows: int) -> int:
        """Gives the size of a tensor of so many rows."""
        return rows * prod(self._dims[name]) * self._dtypes[name].itemsize

    def _described(self, name: str) -> Described:
        """Gives a tensor's name, numpy dtype name, and sizes without the batch."""
        return name, self._dtypes[name].name, self._dims[name]


class _KernelCache:
    """Holds how an RTX plan is run, and the kernels that this GPU's driver has compiled for it.

    A plan for RTX cards is compiled for the card where it is opened; what that gave is kept in the user's
    cache folder, so that the next start does not wait again. TensorRT itself refuses another version's or
    GPU's.
    """

    def __init__(self, trt: Any, engine: Any, plan: Plan) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = base / "peregrine" / "rtx" / f"{plan.key.digest}.kernels"
        self.config = engine.create_runtime_config()
        self.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self.config.create_runtime_cache()
        with contextlib.suppress(OSError):
            self._cache.deserialize(self._path.read_bytes())
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the kernels where there is room; a cache that cannot be written is none."""
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.rename(self._path)


def _checked(path: Path) -> Plan:
    """Reads the plan of the manifest two folders up; ReleaseError unless it fits this node and is whole."""
    plan = read_plan(path.parents[2] / MANIFEST)
    differs = plan.key.difference(this_node(plan.key.flavor))
    if differs:
        raise ReleaseError(f"{path}: {differs}", "build it on this node: `peregrine compile`")
    plan.verify()
    return plan

"""Reaches the GPU through the driver's own library and ctypes: memory, copies, a stream, events.

Chosen over cuda-python and libcudart: libcuda.so.1 comes with the driver, so it is on every machine that has
a GPU, and its functions keep their names and meaning across CUDA versions (the _v2 ones since CUDA 3.2). The
primary context is the one that TensorRT, PyTorch and Faiss use, so pointers are theirs too.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_COUNT = (
    "import ctypes; cuda, n = ctypes.CDLL('libcuda.so.1'), ctypes.c_int(0); "
    "print(0 if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(n)) else n.value)"
)
NO_GPU = (
    "no GPU: the NVIDIA driver (libcuda.so.1) is not on this machine",
    "plans are built and run in the serving image on a GPU node",
)


def _driver() -> Any:
    """Opens libcuda and starts it; ReleaseError where there is no driver or no GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ReleaseError(*NO_GPU) from None
    count = c_int(0)
    if library.cuInit(0) or library.cuDeviceGetCount(byref(count)) or count.value < 1:
        raise ReleaseError(
            "no GPU: the NVIDIA driver is there, but finds no device", "give one to this container"
        )
    return library


def num_gpus() -> int:
    """Counts the GPUs that this process sees, without keeping any; ReleaseError where there is none.

    CUDA reads its variable once a process, so a process of its own counts them.
    """
    counted = subprocess.run(
        [sys.executable, "-S", "-c", _COUNT], capture_output=True, text=True, timeout=60, check=False
    )
    if counted.returncode or not counted.stdout.strip().isdigit() or int(counted.stdout) < 1:
        raise ReleaseError(*NO_GPU)
    return int(counted.stdout)


def gpu_facts(number: int = 0) -> tuple[str, str, str]:
    """Gives name, SM and the driver's CUDA version of a GPU, such as ("NVIDIA H200", "9.0", "13.0").

    Raises ReleaseError without a GPU.
    """
    library, name = _driver(), ctypes.create_string_buffer(256)
    major, minor, version = c_int(), c_int(), c_int()
    device = c_int()
    failed = library.cuDeviceGet(byref(device), number) or library.cuDeviceGetName(name, 256, device)
    failed = (
        failed
        or library.cuDeviceGetAttribute(byref(major), _MAJOR, device)
        or library.cuDeviceGetAttribute(byref(minor), _MINOR, device)
    )
    if failed or library.cuDriverGetVersion(byref(version)):
        raise ReleaseError(f"the NVIDIA driver does not describe GPU {number}", "`nvidia-smi` may say why")
    return (
        name.value.decode(),
        f"{major.value}.{minor.value}",
        f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


class Gpu:
    """Holds GPU 0 with a stream of its own.

    Every call may come from another thread: the context is made current first.
    """

    def __init__(self) -> None:
        self._library = _driver()
        device, self._context, stream = c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)
        self.enter()
        # 1 = non-blocking: does not wait for the default stream
        self._call("cuStreamCreate", byref(stream), 1)
        self.stream = int(stream.value or 0)

    def enter(self) -> None:
        """Makes the GPU's context this thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, num_bytes: int) -> int:
        """Gives the address of new device memory."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(max(1, num_bytes)))
        return address.value

    def free(self, address: int) -> None:
        """Gives device memory back."""
        self.enter()
        self._call("cuMemFree_v2", c_uint64(address))

    def upload(self, array: Array, address: int) -> None:
        """Copies a contiguous array to the device, in the stream."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            c_uint64(address),
            c_void_p(array.ctypes.data),
            c_size_t(array.nbytes),
            c_void_p(self.stream),
        )

    def download(self, address: int, array: Array) -> None:
        """Copies from the device into a contiguous array, in the stream; it is there after synchronize()."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            c_void_p(array.ctypes.data),
            c_uint64(address),
            c_size_t(array.nbytes),
            c_void_p(self.stream),
        )

    def copy(self, source: int, target: int, num_bytes: int) -> None:
        """Copies from device memory to device memory, in the stream."""
        self._call(
            "cuMemcpyDtoDAsync_v2",
            c_uint64(target),
            c_uint64(source),
            c_size_t(num_bytes),
            c_void_p(self.stream),
        )

    def synchronize(self) -> None:
        """Waits for all that is in the stream."""
        self._call("cuStreamSynchronize", c_void_p(self.stream))

    def event(self) -> int:
        """Makes a new event and records it in the stream now."""
        event = c_void_p()
        self._call("cuEventCreate", byref(event), 0)
        self._call("cuEventRecord", event, c_void_p(self.stream))
        return int(event.value or 0)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Gives the milliseconds of GPU time between two events, which are used up by it."""
        milliseconds = c_float()
        self._call("cuEventSynchronize", c_void_p(end))
        self._call("cuEventElapsedTime", byref(milliseconds), c_void_p(start), c_void_p(end))
        for event in (start, end):
            self._call("cuEventDestroy_v2", c_void_p(event))
        return milliseconds.value

    def _call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the driver; ReleaseError with the driver's own text if it fails."""
        code = getattr(self._library, function)(*arguments)
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise ReleaseError(
                f"GPU 0: {function} failed: {(text.value or b'unknown error').decode()} ({code})"
            )

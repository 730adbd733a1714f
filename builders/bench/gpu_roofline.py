"""Reads off the card at hand what it could do at most: no figure of another card stands in for it.

Arithmetic is its multiprocessors times its clock times what one of them does in a clock; memory is measured,
by a copy from the card to itself.
"""

from __future__ import annotations

import ctypes
import statistics
from ctypes import byref, c_int
from dataclasses import dataclass

from ensemble.engines.cuda import Gpu, gpu_facts
from ensemble.errors import ReleaseError

_MULTIPROCESSORS, _CLOCK_KHZ = 16, 13  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _CLOCK_RATE
# Dense fp16 operations of tensor cores with fp32 sums, a clock and a multiprocessor, by compute capability:
# NVIDIA's architecture white papers (Turing to Blackwell).
_FLOPS_A_CLOCK = {"7.5": 1024, "8.0": 2048, "8.6": 512, "8.9": 1024, "9.0": 4096, "10.0": 8192, "12.0": 1024}
_COPIED_BYTES, _COPIES = 1 << 30, 10


@dataclass(frozen=True)
class Peak:
    """Holds a card's most: fp16 operations and bytes of memory traffic, a second."""

    flops: float
    bytes: float

    def share(self, flops: float, traffic: float, ms: float) -> float:
        """Gives the least time that this work needs, of arithmetic or of memory, over the time it took."""
        return max(flops / self.flops, traffic / self.bytes) / (ms / 1e3)


def measure_peak() -> Peak:
    """Measures GPU 0; ReleaseError where there is none, or nothing is known of its kind."""
    _, sm, _ = gpu_facts()
    if sm not in _FLOPS_A_CLOCK:
        raise ReleaseError(
            f"the arithmetic of SM {sm} is not known here", "add it to builders/bench/gpu_roofline.py"
        )
    flops = float(_attribute(_MULTIPROCESSORS)) * _attribute(_CLOCK_KHZ) * 1e3 * _FLOPS_A_CLOCK[sm]
    return Peak(flops, _copy_bytes_per_s())


def _attribute(number: int) -> int:
    value = c_int()
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(byref(value), number, 0):
        raise ReleaseError(f"the NVIDIA driver does not tell attribute {number} of GPU 0")
    return value.value


def _copy_bytes_per_s() -> float:
    """Times copies on the card; bytes read and bytes written both count."""
    gpu = Gpu()
    source, target = gpu.allocate(_COPIED_BYTES), gpu.allocate(_COPIED_BYTES)
    times = []
    for _ in range(_COPIES + 2):
        start = gpu.event()
        gpu.copy(source, target, _COPIED_BYTES)
        times.append(gpu.elapsed_ms(start, gpu.event()))
    gpu.free(source)
    gpu.free(target)
    return 2 * _COPIED_BYTES / (statistics.median(times[2:]) / 1e3)

"""Says where and when a measurement was made: command, date, machine and versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "numpy",
    "onnxruntime",
    "faiss-cpu",
    "tritonclient",
    "grpcio",
    "nvidia-pytriton",
    "peregrine-recommender",
)


def machine() -> dict[str, Any]:
    """Gives command, date, CPU, cores, memory and versions, and how busy the machine was before."""
    return {
        "command": shlex.join(["peregrine", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
            "load_average_1min": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
    }


def _cpu_name() -> str:
    """Gives the CPU's name, as far as the system knows it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Gives the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

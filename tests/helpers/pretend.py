"""Runs code on a pretended GPU: a driver of this machine's own memory (needs a C compiler) and a TensorRT
over ONNX Runtime.

There is no way to run TensorRT without a GPU, and the code around it (buffers, streams, DLPack, keys,
manifests) is where faults hide: so it runs here, unchanged, in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shops import ROOT

SOURCE = Path(__file__).resolve().parent / "pretend_gpu"


def compiler() -> str:
    """A C compiler; without one the test is skipped."""
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler (cc, gcc): the pretended GPU cannot be built")
    return found


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a process needs to find the pretended GPU."""
    library = folder / "libcuda.so.1"
    if not library.exists():
        subprocess.run(
            [compiler(), "-shared", "-fPIC", "-o", str(library), str(SOURCE / "libcuda.c")], check=True
        )
    path = os.pathsep.join([str(SOURCE), str(ROOT), str(ROOT / "tests" / "helpers")])
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def peregrine(env: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(env, str(ROOT / "peregrine.py"), *map(str, arguments))

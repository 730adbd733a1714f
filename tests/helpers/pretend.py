"""Runs code on a pretended GPU: a driver of this machine's own memory (needs a C compiler), and plans that
run on ONNX Runtime.

NVIDIA's own parser and builder make the plans; what no CPU can have is to open them, and the code around
that (buffers, streams, DLPack, keys, manifests) is where faults hide: so it runs here, unchanged, in a
process of its own.
"""

from __future__ import annotations

import importlib.util
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
    if not importlib.util.find_spec("tensorrt_rtx_bindings"):
        pytest.skip("the wheels tensorrt-rtx-cu13-* are not installed: `make test` installs them")
    plans = ROOT / ".pytest_cache" / "d" / "peregrine_plans"  # what NVIDIA's builder has made a plan of
    plans.mkdir(parents=True, exist_ok=True)
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
        "PRETEND_PLANS": str(plans),
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def peregrine(env: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(env, str(ROOT / "peregrine.py"), *map(str, arguments))

"""Chooses what a server runs its engines on: plans of TensorRT, plans for RTX cards, ONNX Runtime on the GPU
or CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ensemble.engines import ENGINE_VARIABLE, ENGINES, ONNXRUNTIME, ONNXRUNTIME_GPU
from ensemble.engines.flavors import MODULES, RTX, TENSORRT, TITLES
from ensemble.engines.plans import Node, Plan, find_plans, read_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release, open_release
from ensemble.server.installation import Installation
from ensemble.server.options import ServeOptions

# Opens every engine of the pipeline, as the engine steps will.
_OPEN_ALL = """
import sys
from pathlib import Path
from ensemble.engines import EngineStep
from ensemble.release.release import open_release
release = open_release(Path(sys.argv[1]), sys.argv[2])
for model in release.pipeline.models:
    if model.is_engine:
        EngineStep(model, release)
"""
_OPEN_TIMEOUT_S = 120.0  # a card compiles its kernels when it opens a plan for the first time
_TITLES = {**TITLES, ONNXRUNTIME_GPU: "ONNX Runtime on the GPU", ONNXRUNTIME: "ONNX Runtime on the CPU"}


@dataclass(frozen=True)
class Runtime:
    """Says what engines run on, decided once when the server starts."""

    engine: str = ONNXRUNTIME  # of the Python engine steps: ensemble.engines.ENGINE_VARIABLE
    plans: tuple[Plan, ...] = ()  # of Triton's native TensorRT backend; empty: it is not used
    node: Node | None = None  # what this machine runs plans with, where it does

    @property
    def title(self) -> str:
        """Names it for people."""
        return f"{TITLES[TENSORRT]}, in Triton's own backend" if self.plans else _TITLES[self.engine]

    @property
    def flags(self) -> tuple[str, ...]:
        """Gives the flags that these plans need beside tritonserver's usual ones."""
        portable = any(plan.key.portable for plan in self.plans)
        return ("--backend-config=tensorrt,version-compatible=true",) if portable else ()


def choose_runtime(
    repository: Path,
    release: str,
    installation: Installation,
    options: ServeOptions,
    log: Callable[[str], None],
) -> Runtime:
    """Chooses the best that can be had and logs why it is not a better one; with `options.require`, that one
    or
    ReleaseError."""
    if options.require == ONNXRUNTIME:
        return Runtime()
    opened = open_release(repository, release)
    choices: dict[str, Callable[[], Runtime]] = {
        TENSORRT: lambda: _tensorrt(opened, installation, options),
        RTX: lambda: _rtx(opened),
        ONNXRUNTIME_GPU: lambda: _onnxruntime_gpu(opened, log),
        ONNXRUNTIME: Runtime,
    }
    if options.require is not None:
        try:
            return choices[options.require]()
        except ReleaseError as error:
            raise ReleaseError(f"--require {options.require}: {error.fact}", error.cure) from None
    misses = []
    for name in ENGINES:
        try:
            runtime = choices[name]()
        except ReleaseError as error:
            text, title = str(error), _TITLES[name]
            misses.append(text if text.startswith(title) else f"{title}: {text}")
            continue
        if misses and (has_gpu() or has_plans(opened)):  # else nobody could expect a plan
            loud = "" if name in (TENSORRT, RTX) else "WARNING: "
            log(f"{loud}engines run on {runtime.title}. {'. '.join(misses)}")
        return runtime
    raise AssertionError("ONNX Runtime on the CPU is always there")


def _tensorrt(release: Release, installation: Installation, options: ServeOptions) -> Runtime:
    """Chooses Triton's own backend where it has one, else the engine steps in Python; ReleaseError names what
    is in the way."""
    from ensemble.engines.tensorrt import this_node

    node = this_node()
    plans = find_plans(release, node)
    if (installation.backends / "tensorrt").is_dir() and not options.fused:
        _check_one_kind(options.num_gpus)
        return Runtime(plans=tuple(plans.values()), node=node)
    if importlib.util.find_spec(MODULES[TENSORRT]):
        return Runtime(TENSORRT, node=node)
    raise ReleaseError(
        f"this tritonserver has no TensorRT backend ({installation.backends}), and Python has no tensorrt "
        "for the engine steps"
    )


def _check_one_kind(num_gpus: int) -> None:
    """Raises ReleaseError unless all GPUs are of one kind: Triton's backend takes one plan for all."""
    from ensemble.engines.cuda import gpu_facts

    first = gpu_facts()
    for number in range(1, num_gpus):
        if gpu_facts(number) != first:
            raise ReleaseError(
                f"GPU {number} is another card ({gpu_facts(number)[0]}) than GPU 0 ({first[0]}), and "
                "Triton's backend runs one plan on all",
                "start one server for each kind of card",
            )


def _rtx(release: Release) -> Runtime:
    """Chooses the engine steps in Python, since Triton's backend does not know such plans; ReleaseError names
    what is in the way: before all the GPU."""
    from ensemble.engines.tensorrt import this_node

    node = this_node(RTX)
    find_plans(release, node)
    _check_opens(release, RTX)
    return Runtime(RTX, node=node)


def _check_opens(release: Release, engine: str) -> list[str]:
    """Opens the release's engines once, in a process that ends; ReleaseError with its last line if they do
    not.

    What is named and fits may still not open (a driver that is too old, a library that is missing), and then
    the next best is taken now instead of a server that does not start. Gives the lines that warn.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _OPEN_ALL, str(release.repository), release.name],
            env={**os.environ, "PYTHONPATH": path, ENGINE_VARIABLE: engine},
            capture_output=True,
            text=True,
            timeout=_OPEN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ReleaseError(f"its engines did not open within {_OPEN_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise ReleaseError(last.removeprefix("ensemble.errors.ReleaseError: "))
    return [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]


def has_gpu() -> bool:
    """Says whether this machine has a GPU."""
    from ensemble.engines.cuda import gpu_facts

    try:
        return bool(gpu_facts())
    except ReleaseError:
        return False


def _onnxruntime_gpu(release: Release, log: Callable[[str], None]) -> Runtime:
    """Chooses ONNX Runtime on the GPU; ReleaseError names what is missing."""
    import onnxruntime

    from ensemble.engines.cuda import gpu_facts
    from ensemble.engines.onnx import CUDA

    gpu_facts()
    active = onnxruntime.get_available_providers()
    if CUDA not in active:
        raise ReleaseError(f"ONNX Runtime has no {CUDA}, only {', '.join(active)}; install onnxruntime-gpu")
    for line in _check_opens(release, ONNXRUNTIME_GPU):
        log(line)
    return Runtime(ONNXRUNTIME_GPU)


def has_plans(release: Release) -> bool:
    """Says whether plans of the release have been built, readable or not."""
    try:
        return bool(read_plans(release))
    except ReleaseError:
        return True  # one that cannot be read is one that somebody built

"""Chooses what a server runs its engines on: TensorRT where this node has a GPU and fitting plans, else ONNX.

Triton reads a plan from the model's own folder, and a release never changes: so the server mounts a folder of
links, in which a model with a plan is the plan's folder and everything else is the repository's own. Nested
in the server's run folder, it is gone with it. Rejected: two --model-repository paths (Triton loads no model
that is in both); a link to the plan inside the release (dangling until compiled, and then a server could not
fall back to ONNX model by model).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ensemble.engines import ONNXRUNTIME, ONNXRUNTIME_GPU, TENSORRT
from ensemble.engines.plans import Plan, find_plans, read_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release, open_release
from ensemble.server.installation import Installation
from ensemble.server.options import ServeOptions

OVERLAY = "repository"  # the folder of links, in the run folder


@dataclass(frozen=True)
class Runtime:
    """Says what engines run on, decided once when the server starts."""

    engine: str = ONNXRUNTIME  # of the Python engine steps: ensemble.engines.ENGINE_VARIABLE
    plans: tuple[Plan, ...] = ()  # of Triton's native TensorRT backend; empty: it is not used

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
    """Chooses TensorRT if it can be had, else ONNX Runtime, and logs why; with `options.require`, that one or
    ReleaseError."""
    require = options.require
    if require == ONNXRUNTIME:
        return Runtime()
    opened = open_release(repository, release)
    try:
        if require == ONNXRUNTIME_GPU:
            return _onnxruntime_gpu()
        return _tensorrt(opened, installation, options.fused)
    except ReleaseError as error:
        if require is not None:
            raise ReleaseError(f"--require {require}: {error}") from None
        return _without_tensorrt(opened, str(error), log)


def _tensorrt(release: Release, installation: Installation, fused: bool) -> Runtime:
    """Chooses Triton's own backend where it has one, else the engine steps in Python; ReleaseError names what
    is in the way."""
    from ensemble.engines.cuda import gpu_facts
    from ensemble.engines.tensorrt import this_node

    gpu_facts()  # before TensorRT is looked for: without a GPU that is what to say
    plans = find_plans(release, this_node())
    if (installation.backends / "tensorrt").is_dir() and not fused:
        return Runtime(plans=tuple(plans.values()))
    if importlib.util.find_spec("tensorrt"):
        return Runtime(TENSORRT)
    raise ReleaseError(
        f"this tritonserver has no TensorRT backend ({installation.backends}), and Python has no tensorrt "
        "for the engine steps"
    )


def _onnxruntime_gpu() -> Runtime:
    """Chooses ONNX Runtime on the GPU; ReleaseError names what is missing."""
    import onnxruntime

    from ensemble.engines.cuda import gpu_facts
    from ensemble.engines.onnx import CUDA

    gpu_facts()
    active = onnxruntime.get_available_providers()
    if CUDA not in active:
        raise ReleaseError(f"ONNX Runtime has no {CUDA}, only {', '.join(active)}; install onnxruntime-gpu")
    return Runtime(ONNXRUNTIME_GPU)


def _without_tensorrt(release: Release, why: str, log: Callable[[str], None]) -> Runtime:
    """Chooses ONNX Runtime, on the GPU if it can; logs `why` unless nobody could expect a plan: no GPU, none
    built."""
    from ensemble.engines.cuda import gpu_facts

    try:
        gpu_facts()
        has_gpu = True
    except ReleaseError:
        has_gpu = False
    try:
        runtime = _onnxruntime_gpu() if has_gpu else Runtime()
    except ReleaseError:
        runtime = Runtime()
    if has_gpu or _has_plans(release):
        where = "on the GPU" if runtime.engine == ONNXRUNTIME_GPU else "on the CPU"
        log(f"WARNING: serving ONNX {where} instead of TensorRT: {why}")
    return runtime


def _has_plans(release: Release) -> bool:
    """Says whether plans of the release have been built, readable or not."""
    try:
        return bool(read_plans(release))
    except ReleaseError:
        return True  # one that cannot be read is one that somebody built


class Overlay:
    """Keeps the folder of links that Triton mounts; refresh() adds releases that were published since."""

    def __init__(self, folder: Path, repository: Path, plans: tuple[Plan, ...]) -> None:
        self.folder, self._repository = folder, repository
        self._plans = {plan.member: plan.member_folder for plan in plans}
        folder.mkdir()
        self.refresh()

    def refresh(self) -> None:
        """Links every folder of the repository and drops links of removed ones. A link that is there stays:
        Triton may be reading it."""
        there = {
            path.name: path
            for path in self._repository.iterdir()
            if path.is_dir() and not path.name.startswith(".")
        }
        for link in self.folder.iterdir():
            if link.name not in there:
                link.unlink()
        for name, path in there.items():
            link = self.folder / name
            if not link.is_symlink():
                link.symlink_to(self._plans.get(name, path), target_is_directory=True)

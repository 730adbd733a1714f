"""Chooses what a server runs its engines on: plans of TensorRT, plans for RTX cards, ONNX Runtime on the GPU
or CPU.

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

from ensemble.engines import ENGINES, ONNXRUNTIME, ONNXRUNTIME_GPU
from ensemble.engines.flavors import MODULES, RTX, TENSORRT, TITLES
from ensemble.engines.plans import Plan, find_plans, read_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release, open_release
from ensemble.server.installation import Installation
from ensemble.server.options import ServeOptions

OVERLAY = "repository"  # the folder of links, in the run folder
_TITLES = {**TITLES, ONNXRUNTIME_GPU: "ONNX Runtime on the GPU", ONNXRUNTIME: "ONNX Runtime on the CPU"}


@dataclass(frozen=True)
class Runtime:
    """Says what engines run on, decided once when the server starts."""

    engine: str = ONNXRUNTIME  # of the Python engine steps: ensemble.engines.ENGINE_VARIABLE
    plans: tuple[Plan, ...] = ()  # of Triton's native TensorRT backend; empty: it is not used

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
        TENSORRT: lambda: _tensorrt(opened, installation, options.fused),
        RTX: lambda: _rtx(opened),
        ONNXRUNTIME_GPU: _onnxruntime_gpu,
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
        if misses and (_has_gpu() or _has_plans(opened)):  # else nobody could expect a plan
            loud = "" if name in (TENSORRT, RTX) else "WARNING: "
            log(f"{loud}engines run on {runtime.title}. {'. '.join(misses)}")
        return runtime
    raise AssertionError("ONNX Runtime on the CPU is always there")


def _tensorrt(release: Release, installation: Installation, fused: bool) -> Runtime:
    """Chooses Triton's own backend where it has one, else the engine steps in Python; ReleaseError names what
    is in the way."""
    from ensemble.engines.tensorrt import this_node

    plans = find_plans(release, this_node())
    if (installation.backends / "tensorrt").is_dir() and not fused:
        return Runtime(plans=tuple(plans.values()))
    if importlib.util.find_spec(MODULES[TENSORRT]):
        return Runtime(TENSORRT)
    raise ReleaseError(
        f"this tritonserver has no TensorRT backend ({installation.backends}), and Python has no tensorrt "
        "for the engine steps"
    )


def _rtx(release: Release) -> Runtime:
    """Chooses the engine steps in Python, since Triton's backend does not know such plans; ReleaseError names
    what is in the way: before all the GPU."""
    from ensemble.engines.tensorrt import this_node

    find_plans(release, this_node(RTX))
    return Runtime(RTX)


def _has_gpu() -> bool:
    """Says whether this machine has a GPU."""
    from ensemble.engines.cuda import gpu_facts

    try:
        return bool(gpu_facts())
    except ReleaseError:
        return False


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

"""Finds this machine's tritonserver, and makes what it is run from in the server's state folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import ServerError

# In a server's state folder, as long as it is at work
BACKENDS, MOUNT, STAGED = "backends", "models", ".mounting"
TIERS, ROUTE, TURNING = "tiers.json", "route.json", "turning.lock"
BYTECODE = "bytecode"  # stays: it is as good for the next server
SHM = Path("/dev/shm")
_SHM_PREFIX = "triton_python_backend_shm_region_peregrine_"


@dataclass(frozen=True, order=True)
class FeatureLevel:
    """Holds tritonserver's version, which decides what we may do. nvidia-pytriton carries 2.51 (24.10)."""

    major: int
    minor: int

    @property
    def may_leave_loopback(self) -> bool:
        """Says whether other machines may reach it: older ones have known holes."""
        return self >= FeatureLevel(2, 72)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


PYTRITON_LEVEL = FeatureLevel(2, 51)


@dataclass(frozen=True)
class Installation:
    """Says where a tritonserver and its parts are on this machine."""

    binary: Path
    backends: Path
    level: FeatureLevel | None  # None: unknown, so nothing is taken for granted
    stub: Path | None = None  # nvidia-pytriton keeps one stub per Python version apart
    libraries: tuple[Path, ...] = ()


def find_tritonserver() -> Installation:
    """Finds the tritonserver on PATH (images), else nvidia-pytriton's; ServerError if there is neither."""
    on_path = shutil.which("tritonserver")
    if on_path:
        root = Path(on_path).resolve().parent.parent
        return Installation(Path(on_path), root / "backends", _level_from_file(root / "TRITON_VERSION"))
    spec = importlib.util.find_spec("pytriton")  # found, not imported: importing it pulls in its own stack
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "tritonserver not found: not on PATH, and nvidia-pytriton is not installed; cure: pip install "
            "'peregrine-recommender[triton]'"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    root, python = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.exists():
        have = ", ".join(sorted(path.name for path in stub.parent.parent.glob("*"))) or "none"
        raise ServerError(f"nvidia-pytriton has no Python backend for Python {python}; it has: {have}")
    libraries = (package.parent / "nvidia_pytriton.libs", _libpython_folder())
    return Installation(root / "bin" / "tritonserver", root / "backends", PYTRITON_LEVEL, stub, libraries)


def _level_from_file(path: Path) -> FeatureLevel | None:
    """Reads an image's TRITON_VERSION; None where there is none."""
    match = re.match(r"(\d+)\.(\d+)", path.read_text()) if path.exists() else None
    return FeatureLevel(int(match[1]), int(match[2])) if match else None


def _libpython_folder() -> Path:
    """Finds this interpreter's libpython: the stub must load that one and no other, or its standard library
    does not fit. ServerError if there is none."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [Path(str(sysconfig.get_config_var(key))) for key in ("LIBDIR", "LIBPL")] + [
        Path(sys.base_prefix) / "lib"
    ]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    places += [Path(base) / str(multiarch) for base in ("/usr/lib", "/lib")] if multiarch else []
    for place in places:
        if (place / name).exists():
            return place
    raise ServerError(
        f"{name} not found, which Triton's Python backend needs; install it (Debian: libpython3) or use a "
        "Python built with --enable-shared"
    )


@dataclass
class RunFolder:
    """Names what a tritonserver is run from, in the state folder of a server that has claimed it: backends as
    this environment needs them, and the models (ensemble/server/mount.py)."""

    path: Path
    region_prefix: str  # of the shared memory of our stubs, in /dev/shm

    def remove(self) -> None:
        """Removes all of it but the claim, and the stubs' shared memory."""
        remove_regions(self.region_prefix)
        empty(self.path)


def make_run_folder(installation: Installation, state: Path) -> RunFolder:
    """Makes what a tritonserver is run from: a copy of the Python backend, with our packages first in its
    sys.path, and links to the other backends; ServerError if it cannot be written."""
    try:
        empty(state)  # of a server that was killed
        _copy_backends(installation, state / BACKENDS)
        (state / MOUNT).mkdir()
    except OSError as error:
        raise ServerError(
            f"cannot write into the state folder {state}: {error.strerror}",
            "free some space, or give `peregrine serve` another --state",
        ) from error
    return RunFolder(state, f"{_SHM_PREFIX}{os.getpid()}_{secrets.token_hex(4)}_")


def empty(state: Path) -> None:
    """Removes from a state folder what lives no longer than its server does."""
    for name in (BACKENDS, MOUNT, STAGED):
        shutil.rmtree(state / name, ignore_errors=True)
    for name in (TIERS, ROUTE, TURNING):
        (state / name).unlink(missing_ok=True)


def _copy_backends(installation: Installation, backends: Path) -> None:
    """Copies the Python backend, and links to the others."""
    (backends / "python").mkdir(parents=True)
    for other in installation.backends.iterdir():
        if other.name != "python":
            (backends / other.name).symlink_to(other)
    for file in (installation.backends / "python").iterdir():
        if file.is_file():
            shutil.copy2(file, backends / "python" / file.name)
    if installation.stub:
        shutil.copy2(installation.stub, backends / "python" / installation.stub.name)
    utils = backends / "python" / "triton_python_backend_utils.py"
    _put_our_packages_first(utils, None if _has_bytecode() else backends.parent / BYTECODE)


def _has_bytecode() -> bool:
    """Says whether the installed packages were compiled; in our images they are not."""
    spec = importlib.util.find_spec("numpy")
    return bool(spec and spec.cached and Path(spec.cached).exists())


def _put_our_packages_first(utils: Path, bytecode: Path | None) -> None:
    """Writes our packages into the stub's sys.path: it ignores PYTHONPATH and virtual environments, and would
    find the base interpreter's numpy first.

    Without `bytecode`, a folder for what it compiles, it writes none: beside a model.py that makes Triton
    load the model again.
    """
    source_root = str(Path(__file__).resolve().parents[2])
    packages = list(
        dict.fromkeys([source_root, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    )
    writing = f"_sys.dont_write_bytecode = {bytecode is None}"
    if bytecode is not None:  # else each of the processes compiles everything, at every start
        writing += f"; _sys.pycache_prefix = {str(bytecode)!r}"
    line = f"import sys as _sys; {writing}; _sys.path[:0] = {packages!r}\n"
    utils.write_text(line + utils.read_text(encoding="utf-8"), encoding="utf-8")


def sweep_regions() -> None:
    """Removes shared memory whose owner was killed."""
    for region in SHM.glob(f"{_SHM_PREFIX}*") if SHM.is_dir() else ():
        owner = region.name[len(_SHM_PREFIX) :].partition("_")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                region.unlink()


def remove_regions(prefix: str) -> None:
    """Removes our stubs' shared memory, which stays behind after a kill -9."""
    for region in SHM.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            region.unlink()

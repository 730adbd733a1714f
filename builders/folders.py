"""Makes folders that appear whole or not at all, and locks that die with their process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ensemble.errors import InvalidInput
from ensemble.release.files import try_flock

SOURCES = Path(__file__).resolve().parent.parent  # the folder that holds builders/ and ensemble/
Inputs = Mapping[str, Path]  # what a stage reads: the folders of finished stages, and the shop's, by name


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Makes a temporary folder beside `out` that takes its name when the block ends, and goes if the block
    raises.

    A killed process leaves `out` as it was, and a hidden .NAME.partial-PID that the next call sweeps.
    """
    out = Path(os.path.abspath(out))
    if out.is_file() or (out.exists() and not force and any(out.iterdir())):
        raise InvalidInput(f"{out} exists already; give another name or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        old = out.parent / f".{out.name}.replaced-{os.getpid()}"
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Removes what killed processes left; a living one's folder stays."""
    for left in [*out.parent.glob(f".{out.name}.partial-*"), *out.parent.glob(f".{out.name}.replaced-*")]:
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not Path("/proc").joinpath(pid).exists()):
            shutil.rmtree(left, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Makes a hard link where the file system allows it, else a copy; unlink one before changing it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def only_one(path: Path, tell: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path` while the block runs; calls `tell` before it waits for another process.

    The kernel frees the lock of a process that is killed; its empty file is no lock.
    """
    descriptor = _locked(path, tell)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, tell: Callable[[], None]) -> int:
    """Opens and locks a file that is still at `path` when the lock is ours: its last holder removes it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_flock(descriptor):
                tell()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)

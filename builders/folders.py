"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ensemble.errors import InvalidInput


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends; removed if the block raises.

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
    """A hard link where the file system allows it, else a copy: whoever changes a linked file must unlink it
    first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

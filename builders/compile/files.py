"""Fills a plan's folder in the staging folder, seals it with a manifest, and renames it in whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from builders.publish.triton_config import config_text, tensorrt_config
from ensemble.arrays import Tensors
from ensemble.engines.flavors import TENSORRT
from ensemble.engines.plans import FORMAT, MANIFEST, PLAN_FILE, read_plan
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release.files import file_sha256, sync_folder, write_durably
from ensemble.release.release import Release
from ensemble.release.repository import locked
from ensemble.spec import ModelSpec


def is_whole(folder: Path) -> bool:
    """Says whether a plan is there with every file as its manifest says; if not, it is to be built again."""
    try:
        read_plan(folder / MANIFEST).verify()
    except PeregrineError:
        return False
    return True


def write_plan(
    folder: Path,
    release: Release,
    model: ModelSpec,
    plan: bytes,
    feeds: Tensors,
    facts: dict[str, Any],
) -> Path:
    """Writes the member folder that Triton mounts, and a manifest to open it by; gives the plan's path.

    A plan for RTX cards has no configuration: Triton's own backend cannot open it.
    """
    member = folder / facts["member"]
    plan_path = member / "1" / PLAN_FILE
    for part in ("1", "warmup"):
        (member / part).mkdir(parents=True)
    _write(plan_path, plan)
    if facts["key"]["flavor"] == TENSORRT:
        (member / "configs").mkdir()
        _write(
            member / "configs" / "tensorrt.pbtxt",
            config_text(tensorrt_config(model, release.name, release.pipeline.max_batch)).encode(),
        )
    for tensor in model.inputs:
        _write(member / "warmup" / tensor.name, np.ascontiguousarray(feeds[tensor.name][0]).tobytes())
    seal(folder, facts)
    return plan_path


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest, with every file's digest."""
    files = {
        str(path.relative_to(folder)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    created = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())}.{time.time_ns() % 10**9:09d}+00:00"
    write_durably(
        folder / MANIFEST,
        json.dumps({"format": FORMAT, "created": created, **facts, "files": files}, indent=1) + "\n",
    )


def move_in(release: Release, staged: Path, folder: Path) -> None:
    """Renames under the repository's lock, so that readers find all or nothing.

    A damaged folder of the same key goes.
    """
    with locked(release.repository):
        if not (release.path / MANIFEST).exists():
            raise ReleaseError(f"release {release.name} was removed while its plans were built")
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            folder.rename(staged.with_name("damaged"))  # inside the staging folder, which is removed
        for path in staged.rglob("*"):
            if path.is_dir():
                sync_folder(path)
        staged.rename(folder)
        sync_folder(folder.parent)


@contextlib.contextmanager
def room_for(release: Release) -> Iterator[None]:
    """Turns a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(release.repository).free / 1e6
            raise ReleaseError(
                f"compile: no space left in {release.repository} ({free:.0f} MB free)",
                "free some and run it again: it goes on",
            ) from error
        raise ReleaseError(
            f"compile: cannot write plans into {release.repository}: {error.strerror} ({error.filename})"
        ) from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

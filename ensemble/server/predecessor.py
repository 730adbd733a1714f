"""Waits for the server that had a state folder before: one that is stopping, or a tritonserver whose
supervisor was killed and that is on its way out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from ensemble.release.files import is_locked
from ensemble.server.installation import MOUNT
from ensemble.server.process import EXIT_TIMEOUT_S
from ensemble.server.running import CLAIM
from ensemble.vitals import vitals_of

_STOPS_S = EXIT_TIMEOUT_S + 25.0  # a drain, and what follows
# An orphan was sent SIGTERM when its supervisor died; requests in it have nobody to answer to
_ORPHAN_S = 8.0


def await_predecessor(state: Path, log: Callable[[str], None]) -> None:
    """Returns when nobody is on the way out of a state folder; one that goes on serving is not waited for."""
    deadline = time.monotonic() + _STOPS_S
    if _is_stopping(state):
        log(f"waiting for the server of {state} to stop")
        while _is_stopping(state) and time.monotonic() < deadline:
            time.sleep(0.05)
    if _claim(state):
        return
    if orphans := _orphans(state):
        log(f"waiting for what a killed server left: tritonserver {', '.join(map(str, orphans))}")
        deadline = time.monotonic() + _ORPHAN_S
        while (left := _orphans(state)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        while _orphans(state) and time.monotonic() < deadline + 2:
            time.sleep(0.05)


def _is_stopping(state: Path) -> bool:
    """Says whether a living server has the state folder and is about to give it free."""
    text = _claim(state)
    try:
        return bool(text) and bool(json.loads(text).get("is_stopping"))
    except ValueError:
        return False


def _claim(state: Path) -> str:
    """Reads the claim of a living server; empty where there is none."""
    try:
        descriptor = os.open(state / CLAIM, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.pread(descriptor, 65536, 0).decode(errors="replace") if is_locked(descriptor) else ""
    finally:
        os.close(descriptor)


def _orphans(state: Path) -> list[int]:
    """Lists the tritonservers that were started on this state folder and still live."""
    wanted, found = f"--model-repository={state / MOUNT}".encode(), list[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "cmdline").read_bytes().split(b"\0") and vitals_of(int(folder.name)):
                found.append(int(folder.name))
    return found

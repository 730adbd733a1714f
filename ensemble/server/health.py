"""Writes how a server is into its state folder, once a second, for `peregrine status`:
<state>/health.json."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEALTH = "health.json"
EVERY_S = 1.0
STARTING, READY, DOWN, STOPPING = "starting", "ready", "down", "stopping"


class HealthFile:
    """Writes one server's health; what cannot be written, as on a full disk, keeps nobody from serving."""

    def __init__(self, state: Path) -> None:
        self._path = state / HEALTH
        self._started, self._since, self._phase = time.time(), time.time(), ""
        self._next_s = 0.0

    def write(self, phase: str, facts: Mapping[str, Any]) -> None:
        """Writes the phase and facts, at most once a second while the phase stays."""
        now = time.monotonic()
        if phase == self._phase and now < self._next_s:
            return
        if phase != self._phase:
            self._phase, self._since = phase, time.time()
        self._next_s = now + EVERY_S
        entries = {"at": time.time(), "started": self._started, "phase": phase, "since": self._since, **facts}
        staged = self._path.with_name(f".{HEALTH}.{os.getpid()}")
        with contextlib.suppress(OSError):
            staged.write_text(json.dumps(entries), encoding="utf-8")
            staged.replace(self._path)

    def remove(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_health(state: Path) -> dict[str, Any] | None:
    """Reads a server's health; None where there is none, or it may not be read."""
    try:
        entries = json.loads((state / HEALTH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entries if isinstance(entries, dict) else None

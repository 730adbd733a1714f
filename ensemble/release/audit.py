"""Keeps a line of every change of a route: who made it, when, from what and to what. <home>/.audit.jsonl"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ensemble.release.route import Route

FILE = ".audit.jsonl"
_TAIL_BYTES = 65_536


def note_change(home: Path, before: Route | None, after: Route) -> None:
    """Appends the line of a change. Call it under locked(); a full disk keeps nobody from changing the
    route."""
    line = {
        "at": after.since,
        "by": after.by,
        "from": _shares(before),
        "to": _shares(after),
        "sequence": after.sequence,
    }
    with contextlib.suppress(OSError), (home / FILE).open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _shares(route: Route | None) -> dict[str, float]:
    """Gives {release: share of the users}."""
    return {one.release: one.share for one in route.shares} if route else {}


def last_changes(home: Path, count: int = 5) -> list[dict[str, Any]]:
    """Reads the last changes, the newest first; none where nothing can be read. A line that was cut off by a
    power cut is left out."""
    try:
        with (home / FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = list[dict[str, Any]]()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
        if len(found) == count:
            break
    return found

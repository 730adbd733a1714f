"""Carries requests through the writing thread, and joins those that wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ensemble.live.writer import MAX_GROUP

OPS = ("change", "status", "merge", "prepare", "compact", "adopt")


class Pending:
    """Holds a request on its way through the writing thread; `reply` counts once `done` is set."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.reply, self.done = request, dict[str, Any](), threading.Event()
        self.folders: list[Path] = []  # of the overlays whose instances are to have what the reply speaks of


def groups(first: Pending, rest: queue.Queue[Pending | None]) -> Iterator[list[Pending]]:
    """Gives what has arrived by now, in groups of which no item is changed twice."""
    group, ids = [first], _ids(first)
    while not rest.empty():
        pending = rest.get()
        if pending is None:
            rest.put(None)
            break
        more = _ids(pending)
        if ids & more or len(ids) + len(more) > MAX_GROUP:
            yield group
            group, ids = [], set()
        group.append(pending)
        ids |= more
    yield group


def _ids(pending: Pending) -> set[str]:
    """Gives the ids that a request changes; what is no change at all is refused when its turn comes."""
    items = [change.get("item") for change in pending.request.get("changes", []) if isinstance(change, dict)]
    return {str(item.get("item_id")) for item in items if isinstance(item, dict)}

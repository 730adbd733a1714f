"""Requests on their way through the writing thread, and how those that wait are joined."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from ensemble.live.writer import MAX_GROUP


class Asked:
    """A request on its way through the writing thread."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request, self.reply, self.done = request, dict[str, Any](), threading.Event()


def groups(first: Asked, rest: queue.Queue[Asked | None]) -> Iterator[list[Asked]]:
    """What has arrived by now, in groups of which no item is changed twice."""
    group, ids = [first], _ids(first)
    while not rest.empty():
        asked = rest.get()
        if asked is None:
            rest.put(None)
            break
        more = _ids(asked)
        if ids & more or len(ids) + len(more) > MAX_GROUP:
            yield group
            group, ids = [], set()
        group.append(asked)
        ids |= more
    yield group


def _ids(asked: Asked) -> set[str]:
    """Ids that a request changes; what is no change at all is refused when its turn comes."""
    items = [change.get("item") for change in asked.request.get("changes", []) if isinstance(change, dict)]
    return {str(item.get("item_id")) for item in items if isinstance(item, dict)}

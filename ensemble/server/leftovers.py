"""Finds the Python processes of models that are served no longer and do not end: Triton (2.51) waits for ever
for a process that hangs while it is being ended, and their memory is gone until the server is started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable

from ensemble.server.process import Stub

LEFT_S = 30.0  # longer than requests in flight are waited for (process.EXIT_TIMEOUT_S)


class Leftovers:
    """Remembers which processes served, and since when they do not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._served, self._until = set[int](), dict[int, float]()

    def look(self, stubs: Iterable[Stub], models: Container[str]) -> list[Stub]:
        """Gives those of the living `stubs` that served once, and whose model has not been one of the
        `models` served for LEFT_S. A process that is being started for a model has never served."""
        now, there = self._clock(), list(stubs)
        self._served &= {stub.pid for stub in there}
        self._served |= {stub.pid for stub in there if stub.model in models}
        left = [stub for stub in there if stub.pid in self._served and stub.model not in models]
        self._until = {stub.pid: self._until.get(stub.pid, now + LEFT_S) for stub in left}
        return [stub for stub in left if now >= self._until[stub.pid]]

    def wait_again(self, stubs: Iterable[Stub]) -> None:
        """Gives processes as long again."""
        self._until |= dict.fromkeys((stub.pid for stub in stubs), self._clock() + LEFT_S)

"""Decides whether a tritonserver that ended is started again, and keeps what became of the earlier ones."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

MAX_DEATHS, DEATHS_WINDOW_S = 5, 60.0  # more deaths than that in this time: give up, and say so
FIRST_TRIES = 3  # of a start that failed by no fault of the release
# What Triton says where a Python process of a model that is being loaded was killed, or died
_LOST = ("exited unexpectedly", "is not healthy", "Stub process")


class Restarts:
    """Counts the deaths of one server's tritonserver."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._deaths = clock, collections.deque[float](maxlen=MAX_DEATHS)
        self._failed_starts = 0
        self.count, self.last = 0, ""  # of restarts; why the last one was

    def pause_s(self, why: str, *, was_ready: bool, exit_code: int | None) -> float | None:
        """Gives the seconds until the next start; None where it does not help.

        A first start is tried again where a signal ended it (Triton dies of its own shared-memory locks in
        one of some seventy starts) or a process of a model was lost; else the release is at fault.
        """
        if not was_ready:
            self._failed_starts += 1
            is_lost = (exit_code or 0) < 0 or any(words in why for words in _LOST)
            if not is_lost or self._failed_starts >= FIRST_TRIES:
                return None
        now = self._clock()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WINDOW_S:
            return None
        self.count, self.last = self.count + 1, why.splitlines()[0]
        return float(0.1 * 2 ** len([death for death in self._deaths if now - death < DEATHS_WINDOW_S]))

    def failure(self, why: str, *, was_ready: bool) -> str:
        """Says why there is no next start."""
        if not was_ready:
            return why
        return f"tritonserver died {MAX_DEATHS} times within {DEATHS_WINDOW_S:.0f} s; the last time: {why}"

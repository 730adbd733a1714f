"""Keeps calls from a Redis that fails: after some failures in a row nobody asks for a while, then one call
tries."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable


class Breaker:
    """Goes from closed to open after `failures` in a row, to half-open after open_s, and then to closed or
    open.

    open_s varies by 20 %, so that processes do not try in step.
    """

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._open_s, self._clock = failures, open_s, clock
        self._failed, self._until, self._trying = 0, 0.0, False
        self._lock = threading.Lock()
        self.opened = 0  # times

    @property
    def state(self) -> str:
        """Names the state: closed, open or half_open."""
        if self._failed < self._limit:
            return "closed"
        return "half_open" if self._trying or self._clock() >= self._until else "open"

    def allow(self) -> bool:
        """Says whether this call may ask; one that may must tell success() or failure()."""
        if self._failed < self._limit:
            return True
        with self._lock:
            if self._trying or self._clock() < self._until:
                return False
            self._trying = True
            return True

    def hurry(self) -> None:
        """Lets the next call try at once, however long this was to stay open: somebody else was just
        answered."""
        with self._lock:
            self._until = self._clock()

    def success(self) -> None:
        """Notes a call that was answered."""
        with self._lock:
            self._failed, self._trying = 0, False

    def failure(self) -> None:
        """Notes a call that was not answered."""
        with self._lock:
            self._failed, self._trying = self._failed + 1, False
            if self._failed >= self._limit:
                self.opened += 1
                self._until = self._clock() + self._open_s * random.uniform(0.8, 1.2)

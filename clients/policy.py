"""Decides for a client when to ask again, whom, and when not at all: latencies, allowances, servers."""

from __future__ import annotations

import collections
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from clients.errors import CallError, Overloaded

RETRY_SHARE, RETRY_BURST = 0.1, 10.0  # retries per call in the long run; at once
HEDGE_SHARE, HEDGE_BURST = 0.05, 20.0  # second calls beside a slow first one
MAX_IN_FLIGHT = 256
NORMAL_SHARE = 0.8  # of the calls in flight; the rest is for those of high priority
DOWN_S = 1.0  # a server that was not there is asked last for so long
# Answers from which the usual time is known; that are kept; between looks
_KNOWN, _KEPT, _EVERY = 50, 512, 64
_LEAST_HEDGE_S, _FIRST_HEDGE_S = 0.02, 0.25  # before a second call; before anything is known
_HEDGE_TIMES = 2.0  # the usual 99th percentile


class Allowance:
    """Allows something for a share of calls, and some at once."""

    def __init__(self, share: float, burst: float, first: float = 1.0) -> None:
        self._share, self._burst, self._left = share, burst, first
        self.taken = 0
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Takes note of a call."""
        with self._lock:
            self._left = min(self._burst, self._left + self._share)

    def take(self) -> bool:
        """Says whether one more is allowed, and counts it."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            self.taken += 1
            return True


class Latencies:
    """Knows what answers usually take."""

    def __init__(self) -> None:
        self._seconds = collections.deque[float](maxlen=_KEPT)
        self._count, self._p99_s, self._p50_s = 0, 0.0, 0.0

    def note(self, seconds: float) -> None:
        """Takes note of an answer's time."""
        self._seconds.append(seconds)
        self._count += 1
        if self._count == _KNOWN or self._count % _EVERY == 0:
            ordered = sorted(self._seconds)
            self._p99_s, self._p50_s = ordered[int(0.99 * len(ordered))], ordered[len(ordered) // 2]

    @property
    def hedge_after_s(self) -> float:
        """Gives the seconds after which an answer is unusually late."""
        if self._count < _KNOWN:
            return _FIRST_HEDGE_S
        return max(_LEAST_HEDGE_S, _HEDGE_TIMES * self._p99_s)

    @property
    def usual_s(self) -> float:
        """Gives what an answer takes; .05 while nothing is known."""
        return self._p50_s or 0.05


class Gate:
    """Lets so many calls be in flight and refuses the others at once: a queue that grows helps nobody."""

    def __init__(self, most: int, latencies: Latencies) -> None:
        self._most, self._latencies, self._count = most, latencies, 0
        self._lock = threading.Lock()

    def enter(self, *, is_high: bool) -> None:
        """Counts a call; Overloaded if there are too many already."""
        most = self._most if is_high else max(1, int(NORMAL_SHARE * self._most))
        with self._lock:
            if self._count < most:
                self._count += 1
                return
        raise Overloaded(
            f"{most} calls of this client are in flight already; ask again in "
            f"{self._latencies.usual_s * 1e3:.0f} ms, or show something else",
            "RESOURCE_EXHAUSTED",
            retry_after_s=self._latencies.usual_s,
        )

    def leave(self) -> None:
        """Takes note that a call has ended."""
        with self._lock:
            self._count -= 1


class Servers:
    """Holds the ways to servers that answer alike, and which of them were not there a moment ago."""

    def __init__(self, transports: Sequence[Any], clock: Callable[[], float] = time.monotonic) -> None:
        self.transports, self._clock = list(transports), clock
        self._down: dict[int, float] = {}  # place -> until when it is asked last
        self._turn = random.randrange(len(self.transports))

    def next(self, tried: Sequence[Any] = ()) -> Any:
        """Gives the server to ask: by turns, those that were there first, one that was not tried first."""
        if len(self.transports) == 1:
            return self.transports[0]
        self._turn += 1
        now = self._clock()

        def rank(place: int) -> tuple[bool, bool, int]:
            is_tried = any(self.transports[place] is one for one in tried)
            is_down = self._down.get(place, 0.0) > now
            return is_tried, is_down, (place - self._turn) % len(self.transports)

        return self.transports[min(range(len(self.transports)), key=rank)]

    def note_error(self, transport: Any, error: CallError) -> None:
        """Takes note that a server could not be reached, or stops."""
        if error.retryable and error.status in ("UNAVAILABLE", "NOT_FOUND", "INVALID_ARGUMENT"):
            place = next((p for p, one in enumerate(self.transports) if one is transport), None)
            if place is not None:
                self._down[place] = self._clock() + DOWN_S

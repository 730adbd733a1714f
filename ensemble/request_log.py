"""Says in the server's log which requests failed or were answered with less than all, and of what release.

A line names the release, the request's id (what its caller sent as Triton's request id) and the model. It
never names a user, an item or what an error says of values: a log is read by many.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from ensemble.arrays import Array
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument, PeregrineError

# What lacks by the server's fault; the other flags say what a caller asked for that is not there
TROUBLE = (
    Degraded.FEATURES_STALE
    | Degraded.FEATURES_MISSING
    | Degraded.RANK_SKIPPED
    | Degraded.CANARY_FAILED
    | Degraded.POPULAR
)
_FAILURES_A_SECOND, _DEGRADED_A_SECOND = 10, 1
_LONGEST_ID = 64
_ODD = re.compile(r"[^\w.:/+=@-]", re.ASCII)


class RequestLog:
    """Writes such lines to stderr, which is tritonserver's own log; so many a second, and counts the rest.

    model  the name of the model, which tells the step
    """

    def __init__(
        self,
        model: str,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._write = model, write or _to_stderr
        self._failures = _Limit(_FAILURES_A_SECOND, clock)
        self._degraded = _Limit(_DEGRADED_A_SECOND, clock)

    def failed(self, release: str, ids: Sequence[str], error: BaseException) -> None:
        """Says of each request of a batch that it failed, and why."""
        for one in ids:
            self._say("ERROR", self._failures, release, one, words_of(error))

    def answered(self, release: str, request: str, degraded: Array, trouble: Degraded = TROUBLE) -> None:
        """Says that a request was answered with less than all, where degraded [B, 1] int64 has `trouble`."""
        bits = Degraded(int(np.bitwise_or.reduce(degraded, axis=None)) & int(trouble))
        if bits:
            names = ", ".join(str(flag.name).lower() for flag in bits)
            self._say("WARNING", self._degraded, release, request, f"answered, degraded: {names}")

    def warned(self, release: str, request: str, words: str) -> None:
        """Says something of a request, or, where it is "", of many."""
        self._say("WARNING", self._failures, release, request, words)

    def _say(self, level: str, limit: _Limit, release: str, request: str, words: str) -> None:
        """Writes a line, unless there were too many within this second."""
        passed_over = limit.take()
        if passed_over is None:
            return
        more = f" (and {passed_over:,} more requests since the line before)" if passed_over else ""
        self._write(
            f"{level}: release {release}, request {shown_id(request)}: model {self._model}: {words}{more}\n"
        )


class _Limit:
    """Lets so many lines through within a second."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most, self._clock = most, clock
        self._until_s, self._left, self._passed_over = float("-inf"), 0, 0

    def take(self) -> int | None:
        """Gives how many lines were held back before this one; None where this one is held back, too."""
        now = self._clock()
        if now >= self._until_s:
            self._until_s, self._left = now + 1.0, self._most
        if self._left <= 0:
            self._passed_over += 1
            return None
        self._left -= 1
        passed_over, self._passed_over = self._passed_over, 0
        return passed_over


def shown_id(request: str) -> str:
    """Gives a request's id as a log shows it: without what could break a line; "-" where there is none."""
    return _ODD.sub("?", request[:_LONGEST_ID]) or "-"


def told(error: BaseException) -> str:
    """Gives what callers hear of an error: our own words, else its kind, since its text may hold values."""
    is_ours = isinstance(error, PeregrineError) and not isinstance(error, InvalidArgument)
    return str(error) if is_ours else type(error).__name__


def words_of(error: BaseException) -> str:
    """Says what a log is told of an error: what callers hear, and, of an exception of others, its place."""
    if isinstance(error, PeregrineError):
        return " ".join(told(error).split())
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f" at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
    return f"{told(error)}{place}"


def _to_stderr(line: str) -> None:
    """Writes a line at once, whole: several processes share the pipe."""
    sys.stderr.write(line)
    sys.stderr.flush()

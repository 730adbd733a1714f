"""Reads a server's own metrics every few seconds, and says what happened in the last minute."""

from __future__ import annotations

import collections
import contextlib
import re
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

EVERY_S, WINDOW_S, _TIMEOUT_S = 5.0, 60.0, 2.0
_LINE = re.compile(r"^(peregrine_\w+)(?:\{(.*)\})? ([-+.\deE]+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Summed over all processes; the labels that are kept
_LISTS, _FLAGS = "peregrine_lists", "peregrine_lists_degraded"
_CLOSED, _FAILURES = "peregrine_tier_breaker_closed", "peregrine_tier_failures"
_TRACKING = "peregrine_tier_tracking"  # 0 also where Redis was never reached: nothing opens a breaker then

Counts = dict[tuple[str, str], float]


def counts_from(text: str) -> Counts:
    """Reads Prometheus' text: {(name, flag or cause): sum over processes}; of breakers, how many are open
    or have nobody behind them."""
    counts = collections.defaultdict[tuple[str, str], float](float)
    reached: dict[tuple[str, str], bool] = {}  # by process
    for line in text.splitlines():
        if not (match := _LINE.match(line)):
            continue
        labels = dict(_LABEL.findall(match[2] or ""))
        if match[1] in (_LISTS, _FLAGS, _FAILURES):
            counts[match[1], labels.get("flag") or labels.get("cause", "")] += float(match[3])
        elif match[1] in (_CLOSED, _TRACKING):
            process = labels.get("model", ""), labels.get("instance", "")
            reached[process] = reached.get(process, True) and float(match[3]) != 0
    if reached:
        counts[_CLOSED, "open"] = float(len(reached) - sum(reached.values()))
    return dict(counts)


class LastMinute:
    """Keeps what the metrics said during a minute, in a thread of its own."""

    def __init__(self, url: str | None) -> None:
        self._url, self._seen = url, collections.deque[tuple[float, Counts]]()

    def start(self, stopping: threading.Event) -> None:
        """Begins to read until `stopping` is set; not at all where metrics are off."""
        if self._url:
            threading.Thread(target=self._run, args=(stopping,), name="metrics-reader", daemon=True).start()

    def _run(self, stopping: threading.Event) -> None:
        """Is the thread."""
        while not stopping.wait(EVERY_S):
            # Whatever is wrong with it: tritonserver may be away
            with (
                contextlib.suppress(OSError, ValueError),
                urllib.request.urlopen(str(self._url), timeout=_TIMEOUT_S) as answer,
            ):
                self.note(time.monotonic(), counts_from(answer.read().decode()))

    def note(self, now: float, counts: Counts) -> None:
        """Takes counts; what was counted before a tritonserver was started again is forgotten."""
        if self._seen and counts.get((_LISTS, ""), 0.0) < self._seen[-1][1].get((_LISTS, ""), 0.0):
            self._seen.clear()
        self._seen.append((now, counts))
        while len(self._seen) > 1 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    def report(self) -> Mapping[str, Any] | None:
        """Gives lists, flagged lists and Redis' failures of the last minute; None where nothing is known."""
        if len(self._seen) < 2:
            return None
        (_, first), (_, last) = self._seen[0], self._seen[-1]
        grown = {key: max(0.0, value - first.get(key, 0.0)) for key, value in last.items()}
        named: dict[str, dict[str, float]] = {_FLAGS: {}, _FAILURES: {}}
        for (name, label), value in grown.items():
            if name in named and value:
                named[name][label] = value
        return {
            "lists": grown.get((_LISTS, ""), 0.0),
            "flagged": named[_FLAGS],
            "redis_failures": named[_FAILURES],
            "open_breakers": last.get((_CLOSED, "open")),
        }

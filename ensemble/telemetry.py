"""Carries numbers that steps tell of themselves: plain values here, Triton's custom metrics later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ensemble.arrays import Array
from ensemble.contract import Degraded

_EVERY_S = 1.0


class Metric(NamedTuple):
    """Holds one number as Prometheus wants it."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float
    is_counter: bool = True  # else a gauge


class AnswerCounts:
    """Counts lists that were given, and those with each flag of contract.Degraded."""

    def __init__(self) -> None:
        self.lists, self.flagged = 0, dict.fromkeys(Degraded, 0)

    def count(self, degraded: Array) -> None:
        """Counts lists with these bits [B, 1] or [B] int64."""
        self.lists += len(degraded)
        if not degraded.any():
            return
        for flag in Degraded:
            self.flagged[flag] += int(np.count_nonzero(degraded & int(flag)))

    def metrics(self) -> list[Metric]:
        """Lists the counts."""
        flags = [
            Metric("peregrine_lists_degraded", (("flag", str(flag.name).lower()),), float(count))
            for flag, count in self.flagged.items()
        ]
        return [Metric("peregrine_lists", (), float(self.lists)), *flags]


class Publisher:
    """Publishes what `read` says, at most once a second, while requests come.

    It has no thread: each number is a call to the server, which may hold the GIL for longer than a tier's
    deadline. Triton's API comes as an argument: python_model.py is its only user.
    """

    def __init__(self, pb_utils: Any, read: Callable[[], list[Metric]], labels: dict[str, str]) -> None:
        self._api, self._read, self._labels = pb_utils, read, labels
        self._published: dict[Any, tuple[Any, float]] = {}
        self._families: dict[str, Any] = {}
        self._next_s = 0.0

    def publish(self) -> None:
        """Publishes the numbers if the last time was a second ago: a counter's growth, a gauge's value."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + _EVERY_S
        for one in self._read():
            metric, last = self._published.get(one[:2]) or (self._metric(one), 0.0)
            if one.is_counter:
                metric.increment(max(0.0, one.value - last))
            else:
                metric.set(one.value)
            self._published[one[:2]] = metric, one.value

    def _metric(self, one: Metric) -> Any:
        """Makes Triton's metric for a number that is published for the first time."""
        if one.name not in self._families:
            kind = self._api.MetricFamily.COUNTER if one.is_counter else self._api.MetricFamily.GAUGE
            words = one.name.removeprefix("peregrine_").replace("_", " ")
            self._families[one.name] = self._api.MetricFamily(name=one.name, description=words, kind=kind)
        return self._families[one.name].Metric(labels={**dict(one.labels), **self._labels})

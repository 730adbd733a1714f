"""Watches a canary: says when the release that is tried is worse than the main one beyond stated limits.

The route's router counts what each release does (ensemble/steps/routing.py: Counts), and writes it once a
second into the server's state folder. Each criterion is a share of requests or lists, compared by a test that
may be looked at as often as one likes (ensemble/server/sequential.py); the level is shared between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble.arrays import Array
from ensemble.release.route import Route
from ensemble.server.router_files import NUMBERS, router_of
from ensemble.server.sequential import Hits, is_worse
from ensemble.steps.routing import edge_s

_OCTAVE = 4  # bins of Counts.seconds in a doubling
# More of the main release's own requests are slow: the load is another than when slow was said to be slow.
_OTHER_LOAD, _LEAST = 0.05, 20  # share of its requests since the last look, of so many at least
_COUNTS = ("requests", "failed", "late", "refused", "lists", "degraded", "empty")


@dataclass(frozen=True)
class Limits:
    """Says how much worse than the main release a canary may be, and how sure one must be of it."""

    minimum: int = 50  # requests of each release; below, nothing is said
    alpha: float = 0.01  # the chance that a canary that keeps all limits is ever taken out
    failed: float = 0.01  # more of its requests failed or late
    refused: float = 0.01  # more refused as the caller's fault: it knows less
    degraded: float = 0.05  # more lists that say that something was missing
    empty: float = 0.01  # more lists with nothing in them, or one score for all
    slow: float = 0.01  # more requests slower than twice the main release's 99th percentile
    strange: float = 0.25  # more lists whose best score is outside what 99% of the main release's have


class Numbers(NamedTuple):
    """Holds what one release did since its router began, over all instances."""

    requests: int
    failed: int
    late: int  # and answered all the same: only the main release's are waited for
    refused: int
    lists: int
    degraded: int
    empty: int
    seconds: Array  # [TIME_BINS] int64
    scores: Array  # [SCORE_BINS] int64


class _Usual(NamedTuple):
    """Is what the main release's first requests were like; later ones are compared with it."""

    low_bin: int  # of scores, the first and the last that are not strange
    high_bin: int
    main: Numbers  # up to there
    canary: Numbers


class _Times(NamedTuple):
    """Says what is slow at the present load, and what was counted before."""

    slow_bin: int  # the last bin that is not slow
    main: Array  # [TIME_BINS] int64
    canary: Array  # [TIME_BINS] int64
    loads: int  # how many loads there were


class Guard:
    """Judges the canary of one route, look by look."""

    def __init__(self, route: Route, limits: Limits | None = None) -> None:
        self.route, self.limits = route, limits or Limits()
        self._usual: _Usual | None = None
        self._times: _Times | None = None
        self._last = np.zeros(0, np.int64)  # the main release's seconds at the last look

    def verdict(self, main: Numbers, canary: Numbers) -> str:
        """Says why the canary is worse; empty as long as nobody can tell."""
        if self.is_short(main, canary):
            return ""
        if self._usual is None or main.requests < self._usual.main.requests:  # or the server began anew
            self._usual, self._times = _usual(main, canary), _times(main.seconds, main, canary, 1)
            self._last = main.seconds
        assert self._times is not None
        self._times = self._of_this_load(self._times, main, canary)
        shares = self._shares(main, canary, self._times)
        alpha = self.limits.alpha / len(shares)
        # The test of times begins anew with each load: the levels of all of them add up to alpha.
        loads = self._times.loads
        alphas = {"slow": alpha / (loads * (loads + 1))}
        for name, (tried, other) in shares.items():
            if is_worse(tried, other, getattr(self.limits, name), alphas.get(name, alpha)):
                return _sentence(name, tried, other, getattr(self.limits, name), self._times)
        return ""

    def _of_this_load(self, times: _Times, main: Numbers, canary: Numbers) -> _Times:
        """Says anew what is slow if the main release has become slow itself: at another load the two differ
        by more than at rest, whoever is the better one."""
        recent, self._last = main.seconds - self._last, main.seconds
        slow = _outside(recent, 0, times.slow_bin)
        if slow.trials < _LEAST or slow.share <= _OTHER_LOAD:
            return times
        return _times(recent, main, canary, times.loads + 1)

    def is_short(self, main: Numbers, canary: Numbers) -> bool:
        """Says whether there is not enough traffic to say anything."""
        return min(main.requests, canary.requests) < self.limits.minimum

    def _shares(self, main: Numbers, canary: Numbers, times: _Times) -> dict[str, tuple[Hits, Hits]]:
        """Gives each criterion's hits, the canary's first."""
        usual = self._usual
        assert usual is not None
        slow = tuple(
            _outside(seconds, 0, times.slow_bin)
            for seconds in (canary.seconds - times.canary, main.seconds - times.main)
        )
        strange = tuple(
            _outside(now.scores - then.scores, usual.low_bin, usual.high_bin)
            for now, then in ((canary, usual.canary), (main, usual.main))
        )
        both = {
            name: tuple(
                Hits(sum(getattr(one, what) for what in hits), getattr(one, of)) for one in (canary, main)
            )
            for name, hits, of in (
                ("failed", ("failed", "late"), "requests"),
                ("refused", ("refused",), "requests"),
                ("degraded", ("degraded",), "lists"),
                ("empty", ("empty",), "lists"),
            )
        }
        return {name: (two[0], two[1]) for name, two in {**both, "slow": slow, "strange": strange}.items()}


def _usual(main: Numbers, canary: Numbers) -> _Usual:
    """Takes as usual what the main release's lists were like so far: best scores from the .5th percentile
    to the 99.5th, a bin wider at each end."""
    low, high = _quantile_bin(main.scores, 0.005) - 1, _quantile_bin(main.scores, 0.995) + 1
    return _Usual(low, high, main, canary)


def _times(seconds: Array, main: Numbers, canary: Numbers, loads: int) -> _Times:
    """Calls slow what took more than twice the 99th percentile of the main release's `seconds`
    [TIME_BINS]."""
    return _Times(_quantile_bin(seconds, 0.99) + _OCTAVE, main.seconds, canary.seconds, loads)


def _quantile_bin(bins: Array, share: float) -> int:
    """Finds the bin in which a quantile lies."""
    return int(np.searchsorted(np.cumsum(bins), share * bins.sum()))


def _outside(bins: Array, low: int, high: int) -> Hits:
    """Counts what fell outside the bins from `low` to `high`."""
    total = int(bins.sum())
    return Hits(total - int(bins[max(0, low) : high + 1].sum()), total)


_WORDS = {
    "failed": "requests failed or were late",
    "refused": "requests were refused",
    "degraded": "lists were degraded",
    "empty": "lists were empty or of one score",
    "strange": "lists have a best score unlike the main release's",
}


def _sentence(name: str, tried: Hits, main: Hits, limit: float, times: _Times) -> str:
    """Says what was seen of one criterion."""
    words = _WORDS.get(name) or f"requests took longer than {edge_s(times.slow_bin) * 1e3:.0f} ms"
    return (
        f"{tried.share:.1%} of {tried.trials} {words}; the main release: {main.share:.1%} of {main.trials}, "
        f"and {limit:.0%} more are let pass"
    )


def read_numbers(state: Path, route: Route) -> tuple[Numbers, Numbers] | None:
    """Reads what (the main release, the canary) did, over all instances of the route's router; None before
    any has written it."""
    counts = [
        one["releases"]
        for one in map(_read, (state / NUMBERS).glob(f"{router_of(route)}_*.json"))
        if one is not None and one.get("sequence") == route.sequence
    ]
    if not counts:
        return None
    main, canary = (_summed([one[name] for one in counts]) for name in route.releases)
    return main, canary


def _read(path: Path) -> dict[str, Any] | None:
    """Reads an instance's file; None where it cannot be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _summed(counts: list[Mapping[str, Any]]) -> Numbers:
    """Adds up what the instances counted of one release."""
    summed: dict[str, Any] = {name: sum(int(one[name]) for one in counts) for name in _COUNTS}
    bins = {name: np.sum([one[name] for one in counts], axis=0) for name in ("seconds", "scores")}
    return Numbers(**summed, **bins)

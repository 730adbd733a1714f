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

    slow_bin: int  # the last bin that is not slow
    low_bin: int  # of scores, the first and the last that are not strange
    high_bin: int
    main: Numbers  # up to there
    canary: Numbers


class Guard:
    """Judges the canary of one route, look by look."""

    def __init__(self, route: Route, limits: Limits | None = None) -> None:
        self.route, self.limits = route, limits or Limits()
        self._usual: _Usual | None = None

    def verdict(self, main: Numbers, canary: Numbers) -> str:
        """Says why the canary is worse; empty as long as nobody can tell."""
        if self.is_short(main, canary):
            return ""
        if self._usual is None or main.requests < self._usual.main.requests:  # or the server began anew
            self._usual = _usual(main, canary)
        shares = self._shares(main, canary)
        alpha = self.limits.alpha / len(shares)
        for name, (tried, other) in shares.items():
            if is_worse(tried, other, getattr(self.limits, name), alpha):
                return _sentence(name, tried, other, getattr(self.limits, name), self._usual)
        return ""

    def is_short(self, main: Numbers, canary: Numbers) -> bool:
        """Says whether there is not enough traffic to say anything."""
        return min(main.requests, canary.requests) < self.limits.minimum

    def _shares(self, main: Numbers, canary: Numbers) -> dict[str, tuple[Hits, Hits]]:
        """Gives each criterion's hits, the canary's first."""
        assert self._usual is not None
        slow, strange = (
            tuple(
                _outside(getattr(now, what) - getattr(then, what), low, high)
                for now, then in ((canary, self._usual.canary), (main, self._usual.main))
            )
            for what, low, high in (
                ("seconds", 0, self._usual.slow_bin),
                ("scores", self._usual.low_bin, self._usual.high_bin),
            )
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
    """Takes as usual what the main release's requests were like so far: times up to twice the 99th
    percentile, best scores from the .5th to the 99.5th, a bin wider at each end."""
    slow_bin = _quantile_bin(main.seconds, 0.99) + _OCTAVE
    low, high = _quantile_bin(main.scores, 0.005) - 1, _quantile_bin(main.scores, 0.995) + 1
    return _Usual(slow_bin, low, high, main, canary)


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


def _sentence(name: str, tried: Hits, main: Hits, limit: float, usual: _Usual) -> str:
    """Says what was seen of one criterion."""
    words = _WORDS.get(name) or f"requests took longer than {edge_s(usual.slow_bin) * 1e3:.0f} ms"
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

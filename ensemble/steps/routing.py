"""Splits a request between the releases of a route, and puts their answers together in the users' order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.contract import Degraded

# What the canary does not answer in its part of the budget the main release answers in the rest
BUDGET_SHARE, LONGEST_WAIT_S = 0.5, 0.5


class Part(NamedTuple):
    """Is what one release answers of a request: which of the route's releases, and places of users [b]."""

    place: int
    users: Array


def parts_of(places: Array) -> list[Part]:
    """Splits B users by the release that answers each, [B] places in the route: a part for every release that
    has any."""
    return [Part(int(place), np.flatnonzero(places == place)) for place in np.unique(places)]


def wait_s(budget_us: int) -> float:
    """Gives the seconds that a canary has for its part of a request; a budget of 0 microseconds is none."""
    return min(BUDGET_SHARE * budget_us / 1e6, LONGEST_WAIT_S) if budget_us > 0 else LONGEST_WAIT_S


def joined(parts: Sequence[Part], answers: Sequence[Tensors]) -> Tensors:
    """Puts the answers of parts, [b, K, …] each, together as [B, K, …] in the order of the request's users.

    Lists that are shorter than the longest are padded with empty ids and zeros.
    """
    if len(parts) == 1:
        return answers[0]
    order = np.argsort(np.concatenate([part.users for part in parts]), kind="stable")
    return {
        name: np.concatenate(_as_wide([answer[name] for answer in answers]))[order] for name in answers[0]
    }


def _as_wide(arrays: Sequence[Array]) -> list[Array]:
    """Pads arrays [b, k, …] to the widest k."""
    width = max(array.shape[1] for array in arrays)
    padded = []
    for array in arrays:
        filler: Any = b"" if array.dtype == object else 0
        rest = np.full((len(array), width - array.shape[1], *array.shape[2:]), filler, array.dtype)
        padded.append(np.concatenate([array, rest], axis=1) if rest.shape[1] else array)
    return padded


def flagged(answer: Tensors) -> Tensors:
    """Notes in an answer that it is the main release's in the place of a canary that failed."""
    return {**answer, "degraded": answer["degraded"] | np.int64(Degraded.CANARY_FAILED)}


class Counts:
    """Counts what one release of a route did: requests, or parts of them, and the lists in them.

    Times fall into bins a quarter of an octave wide from 1 ms on, top scores into bins of asinh(1000 score),
    a quarter wide: near 0 they are fine, above they grow with the score.
    """

    TIME_BINS, SCORE_BINS = 60, 121

    def __init__(self) -> None:
        self.requests = self.failed = self.late = self.refused = 0
        self.lists = self.degraded = self.empty = 0
        self.seconds = np.zeros(self.TIME_BINS, np.int64)
        self.scores = np.zeros(self.SCORE_BINS, np.int64)

    def answer(self, seconds: float, answer: Tensors, limit_s: float) -> None:
        """Counts an answer: its scores [b, K], probabilities [b, K, T] and degraded [b, 1].

        It is late where a canary would not have been waited for: only so are the two compared fairly.
        """
        scores = answer["scores"]
        self.requests += 1
        self.late += seconds > limit_s
        self.seconds[min(max(0, math.ceil(4 * math.log2(max(seconds, 1e-3) * 1e3))), self.TIME_BINS - 1)] += 1
        self.lists += len(scores)
        self.degraded += int(np.count_nonzero(answer["degraded"]))
        self.empty += int(np.count_nonzero(_is_void(scores, answer["probabilities"])))
        middle = self.SCORE_BINS // 2
        bins = np.rint(4 * np.arcsinh(scores[:, 0].astype(float) * 1e3)).clip(-middle, middle)
        np.add.at(self.scores, bins.astype(np.int64) + middle, 1)

    def failure(self) -> None:
        """Counts a request that failed or was not answered in time."""
        self.requests += 1
        self.failed += 1

    def refusal(self) -> None:
        """Counts a request that was refused as the caller's fault."""
        self.requests += 1
        self.refused += 1

    def to_json(self) -> dict[str, Any]:
        """Gives all counts as JSON's types."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }


def _is_void(scores: Array, probabilities: Array) -> Array:
    """Says which lists [b] are empty, or have one score for all their items."""
    if scores.shape[1] > 1:
        return (scores == scores[:, :1]).all(axis=1)
    return (scores == 0).all(axis=1) & (probabilities == 0).all(axis=(1, 2))


def edge_s(time_bin: int) -> float:
    """Gives the longest time that falls into a bin of Counts.seconds, but for the last, which has no end."""
    return float(2 ** (time_bin / 4) * 1e-3)

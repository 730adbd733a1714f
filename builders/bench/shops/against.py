"""Holds two records of a shop together, by the users and exposures that are in both: what is surely worse.

A figure of lists is compared by a paired bootstrap over users, one of tasks by the same resamples of users
for both; worth as `release activate` compares it. Simple ways' figures on tasks, seconds and memory have no
rows: their difference stands alone, and judges nothing. The interval is of the users that happened to be
asked, not of the training's luck: one seed against another of the same code shows how far that goes.

Axes: Q held-out next items, E exposures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from builders.bench.shops.record import (
    CHAIN,
    NEXT,
    PLACED,
    RANKER,
    STATISTICS,
    WORTH,
    Figure,
    Record,
    column,
    of_places,
)
from ensemble.arrays import Array
from ensemble.bootstrap import Spread, groups, paired_difference, spreads
from ensemble.release.held_out import FEWEST_USERS, compare
from ensemble.release.held_out import WORTH as BY_WORTH

BETTER, WORSE, SAME = "surely better", "surely worse", "no difference seen"
ALONE, FEW = "without interval", f"fewer than {FEWEST_USERS} users"
GONE, APART = "gone", "no rows in common"
_LESS_IS_BETTER = ("ece", "rmse")
_BAD = (WORSE, GONE, APART)
_LUCK = "surely worse is said of these users: whether the training had bad luck, another --seed of both runs says"
Interval = tuple[float, float, float]  # difference, low, high


@dataclass(frozen=True)
class Change:
    """Says what became of one figure."""

    of: str
    way: str
    figure: str
    before: float | None
    after: float | None
    verdict: str
    difference: float | None = None  # after - before, on the rows in both where it has an interval
    low: float | None = None
    high: float | None = None

    @property
    def is_bad(self) -> bool:
        """Says whether somebody should look."""
        return self.verdict in _BAD


@dataclass(frozen=True)
class Comparison:
    """Says what became of a shop."""

    changes: list[Change]
    serves: list[str]  # what is served otherwise, a line each
    notes: list[str]  # what a reader of the changes should know

    @property
    def is_bad(self) -> bool:
        """Says whether a figure is surely worse, or something else than before is served."""
        return bool(self.serves) or any(change.is_bad for change in self.changes)

    def line(self) -> str:
        """Says it in a line."""
        bad = [f"{told(change)}" for change in self.changes if change.is_bad]
        better = [f"{told(change)}" for change in self.changes if change.verdict == BETTER]
        parts = [*(f"serves otherwise: {one}" for one in self.serves), *bad, *better]
        same = sum(change.verdict == SAME for change in self.changes)
        return "; ".join([*parts, f"no difference seen in {same} figures"])


def told(change: Change) -> str:
    """Names a change: "surely worse: next item, chain, ndcg@10 -0.0040 [-0.0061, -0.0019]"."""
    interval = "" if change.low is None else f" [{change.low:+.4f}, {change.high:+.4f}]"
    by = "" if change.difference is None else f" {change.difference:+.4f}{interval}"
    return f"{change.verdict}: {change.of}, {change.way}, {change.figure}{by}"


def compared(before: Record, after: Record) -> Comparison:
    """Compares a record with an earlier one of the same shop."""
    rows = _Rows.of(before, after)
    known = {figure.name: figure for figure in after.figures}
    changes = [_change(figure, known.get(figure.name), before, after, rows) for figure in before.figures]
    notes = rows.notes(before, after)
    if any(change.verdict == WORSE for change in changes):
        notes.append(_LUCK)
    return Comparison([*changes, *_costs(before, after)], list(_served(before, after)), notes)


@dataclass(frozen=True)
class _Rows:
    """Holds which rows of two records are the same ones: places in each, [2, Q] and [2, E]."""

    users: Array
    tasks: Array

    @classmethod
    def of(cls, before: Record, after: Record) -> _Rows:
        users = shared_rows(before.users, after.users, ("user_id", "item_id"))
        if before.tasks is None or after.tasks is None:
            return cls(users, np.zeros((2, 0), np.int64))
        return cls(users, shared_rows(before.tasks, after.tasks, ("user_id", "item_id", "time")))

    def notes(self, before: Record, after: Record) -> list[str]:
        """Says what else than the code differs."""
        lines = [
            f"{what} {of(after)}, before {of(before)}"
            for what, of in (
                ("preset", lambda one: one.facts["release"]["preset"]),
                ("seed", lambda one: one.facts["seed"]),
            )
            if of(after) != of(before)
        ]
        pairs = [("held-out next items", before.users, after.users, self.users)]
        if before.tasks is not None and after.tasks is not None:
            pairs.append(("held-out exposures", before.tasks, after.tasks, self.tasks))
        for what, first, second, both in pairs:
            if not len(first) == len(second) == both.shape[1]:
                lines.append(f"{both.shape[1]:,} {what} are in both, of {len(first):,} and {len(second):,}")
        return lines


def shared_rows(first: pa.Table, second: pa.Table, names: Sequence[str]) -> Array:
    """Gives the rows that two tables share by the columns `names`: places in each, [2, Q] int64. Rows that
    are alike are told apart by their order."""
    places = {key: at for at, key in enumerate(_keys(first, names))}
    pairs = [(places[key], at) for at, key in enumerate(_keys(second, names)) if key in places]
    return np.array(pairs, np.int64).reshape(-1, 2).T


def _keys(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    seen: Counter[tuple[Any, ...]] = Counter()
    for key in zip(*(table[name].to_pylist() for name in names), strict=True):
        seen[key] += 1
        yield *key, seen[key]


# --- one figure


def _change(old: Figure, new: Figure | None, before: Record, after: Record, rows: _Rows) -> Change:
    """Says what became of a figure."""
    if new is None or (new.value is None and old.value is not None):
        return Change(*old.name, old.value, None, GONE)
    found: Interval | str | None = None
    if old.of == NEXT:
        found = _by_users(old, before, after, rows.users)
    elif old.of == WORTH and old.way == CHAIN:
        found = _by_worth(before, after)
    elif old.way in (RANKER, PLACED) and before.tasks is not None and after.tasks is not None:
        found = _by_tasks(old, before.tasks, after.tasks, rows.tasks)
    return _judged(old, new, found)


def _judged(old: Figure, new: Figure, found: Interval | str | None) -> Change:
    """Puts the verdict to a difference: an interval, why there is none, or None where none is to be had."""
    if isinstance(found, tuple) and all(np.isfinite(found)):
        difference, low, high = found
        sign = -1 if old.figure in _LESS_IS_BETTER else 1
        least, most = sorted((sign * low, sign * high))
        verdict = BETTER if least > 0 else WORSE if most < 0 else SAME
        return Change(*old.name, old.value, new.value, verdict, difference, low, high)
    plain = None if old.value is None or new.value is None else new.value - old.value
    return Change(*old.name, old.value, new.value, found if isinstance(found, str) else ALONE, plain)


def _by_users(figure: Figure, before: Record, after: Record, rows: Array) -> Interval | str:
    """Compares a way's lists on the next items that both asked for."""
    if not rows.shape[1]:
        return APART
    users = before.users["user_id"].to_numpy()[rows[0]]
    if len(np.unique(users)) < FEWEST_USERS:
        return FEW
    first, second = (
        of_places(figure.figure, _ranks(of.users, figure.way)[at])
        for of, at in zip((before, after), rows, strict=True)
    )
    found = paired_difference(first, second, users)
    return found.mean, found.low, found.high


def _ranks(users: pa.Table, way: str) -> Array:
    """Gives a way's ranks [Q], 0 = first, inf = missed."""
    places = column(users, f"place_{way}")
    return np.where(np.isnan(places), np.inf, places - 1)


def _by_worth(before: Record, after: Record) -> Interval | None:
    """Compares what the served lists are worth, where both measured it in the same way."""
    same = before.facts["worth"] == after.facts["worth"]
    found = compare(before.held_out, after.held_out, same_worth=same)
    if found.figure != BY_WORTH or found.difference is None or found.low is None or found.high is None:
        return None
    return found.difference, found.low, found.high


def _by_tasks(figure: Figure, before: pa.Table, after: pa.Table, rows: Array) -> Interval | str:
    """Compares a task's values on the exposures that both asked about, where their labels are the same."""
    name = f"label_{figure.of}"
    labels, others = (column(of, name)[at] for of, at in zip((before, after), rows, strict=True))
    keep = np.flatnonzero(np.isfinite(labels) & (labels == others))
    if not len(keep):
        return APART
    num_users, group = groups(before["user_id"].to_numpy()[rows[0]][keep])
    if num_users < FEWEST_USERS:
        return FEW
    statistics = [
        STATISTICS[figure.figure](
            labels[keep], column(of, f"{figure.way}_{figure.of}")[at][keep], group, num_users
        )
        for of, at in zip((before, after), rows, strict=True)
    ]
    first, second = spreads(statistics, num_users, width=len(keep))
    gain = Spread(second.value - first.value, second.samples - first.samples)
    return gain.value, gain.low, gain.high


# --- what has no rows


def _served(before: Record, after: Record) -> Iterator[str]:
    """Says what is served otherwise than before."""
    old, new = before.facts["serves"], after.facts["serves"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield f"{name} is {new.get(name, 'not told')}, was {old.get(name, 'not told')}"


def _costs(before: Record, after: Record) -> list[Change]:
    """Gives what whole builds took."""
    changes = []
    for name in ("seconds", "cpu_seconds", "peak_bytes"):
        costs = [record.facts.get("build") or {} for record in (before, after)]
        if all(name in cost and not cost["skipped"] for cost in costs):
            first, second = (float(cost[name]) for cost in costs)
            changes.append(Change("build", "", name, first, second, ALONE, second - first))
    return changes

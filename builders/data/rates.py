"""Counts how often each user's and each item's exposures lead to each task's event: smoothed rates, which the
ranker reads as features and starts from.

A rate of task t is logit((s + m p) / (n + m)) - logit(p): s events among n exposures, p the rate of all, m
the strength of that prior (Micci-Barreca 2001, eq. 3). m is the one of _STRENGTHS under which the rates that
were known before each row foretell the row best. Numbers have their mean in place of the rate, in deviations.

Where the shop logs positions, an exposure counts in n as much as its place is worth against all (clicks over
expected clicks: Zhang & Jones 2007): what stood at the end and was passed over says little against an item.

A row's own label is never in its own rates. With a clock they are those known strictly before a moment, of
exposures that had been shown and events that had happened by then (ordered target statistics: Prokhorenkova
et al. 2018, section 3.2). That moment is some time before the row's own, since what is served is as old as
its release: a ranker that learns from rates of the moment leans on what nobody tells it when it serves, and
hardly reads what the past tells of a user instead. Without a clock they come from the other four fifths of
the rows.

    item rates [P]   for each group of items (the item itself, then each of its category features with one
                     value) one rate a task; last log(1 + exposures of the item)
    user rates [Q]   one rate a task; last log(1 + exposures of the user)

Axes: E impressions, T tasks, I items, U users.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, Impressions
from builders.data.places import place_rates, places_of
from ensemble.arrays import Array
from ensemble.schema import Feature, Schema, Task

_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_FOLDS = 5
_MOST = 4.0  # a rate's size at most


def with_rates(schema: Schema) -> Schema:
    """Gives the schema of a shop with labels: its rates stand behind the item features and in user_state."""
    tasks = len(schema.tasks)
    num_items, num_users = tasks * (1 + len(grouping(schema))) + 1, tasks + 1
    sizes = schema.sizes
    return replace(
        schema,
        sizes=replace(
            sizes,
            item_features=sizes.item_features - sizes.item_rates + num_items,
            item_rates=num_items,
            user_rates=num_users,
        ),
    )


def grouping(schema: Schema) -> list[Feature]:
    """Lists the category features of items that hold one value each: their values are groups of items."""
    return [f for f in schema.items.features if f.kind == "category" and f.width == 1]


@dataclass(frozen=True)
class Rates:
    """Holds the rates of one shop's training impressions."""

    # [E, P] and [E, Q] float32: those known before each training impression, or some time before (moments_of)
    of_rows: tuple[Array, Array]
    items: Array  # [I + 1, P] float32: known when training ended; row 0 and the groups' columns are 0
    users: Array  # [U + 1, Q] float32; row 0 is 0
    codes: Array  # [codes, T] float32: the rates of each value of the grouping features
    priors: Array  # [T] float32: logit of the rate of all; 0 for numbers, which are standardized


def moments_of(times: Array, age: float, *, has_clock: bool) -> Array:
    """Draws up to when each row [E] knows its rates [E] int64: back from its own time by up to a share `age`
    of all rows, as held-out parts are cut by rows; its own time without a clock. The same times give the
    same."""
    if not has_clock or not age:
        return times
    in_order = np.sort(times)
    back = (np.random.default_rng(0).random(len(times)) * age * len(times)).astype(np.int64)
    return in_order[np.maximum(np.searchsorted(in_order, times) - back, 0)]


def rates_of(dataset: Dataset, impressions: Impressions, age: float) -> Rates:
    """Counts the rates of the impressions [E], which are those that may be trained on; of_rows are old by up
    to a share `age` of them."""
    schema, num = dataset.schema, len(impressions.times)
    tasks = len(schema.tasks)
    groups = [np.asarray(impressions.item_rows)]
    groups += [
        np.asarray(dataset.item_codes[impressions.item_rows, f.start]).astype(np.int64)
        for f in grouping(schema)
    ]
    sizes = [dataset.num_items + 1, *[schema.items.num_codes] * (len(groups) - 1)]
    own = _Log(impressions, schema.tasks, age, has_clock=schema.has_clock)
    of_items = np.zeros((num, schema.sizes.item_rates), np.float32)
    of_users = np.zeros((num, schema.sizes.user_rates), np.float32)
    items = np.zeros((dataset.num_items + 1, schema.sizes.item_rates), np.float32)
    users = np.zeros((dataset.num_users + 1, schema.sizes.user_rates), np.float32)
    codes = np.zeros((schema.items.num_codes, tasks), np.float32)
    for place, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for t in range(tasks):
            before, after = own.rates(t, group, size)
            of_items[:, place * tasks + t] = before
            if place:
                codes[:, t] += after  # features own codes of their own: the others' are 0
            else:
                items[:, t] = after
    for t in range(tasks):
        of_users[:, t], users[:, t] = own.rates(t, np.asarray(impressions.user_rows), len(users))
    for rows, table, group in (
        (of_items, items, groups[0]),
        (of_users, users, np.asarray(impressions.user_rows)),
    ):
        shown, total = own.exposures(group, len(table))
        rows[:, -1], table[:, -1] = np.log1p(shown), np.log1p(total)
    items[0] = users[0] = codes[0] = 0
    return Rates((of_items, of_users), items, users, codes, own.priors)


class _Log:
    """Holds the impressions of training as counts can be taken of them."""

    def __init__(self, impressions: Impressions, tasks: tuple[Task, ...], age: float, *, has_clock: bool):
        self.tasks, self.has_clock = tasks, has_clock
        self.times = np.asarray(impressions.times)
        self.asked = moments_of(self.times, age, has_clock=has_clock)
        self.labels = np.asarray(impressions.labels, np.float64)
        known = impressions.known_times
        self.known = np.repeat(self.times[:, None], len(tasks), 1) if known is None else np.asarray(known)
        self.folds = np.random.default_rng(0).integers(0, _FOLDS, len(self.times))
        self.scales = [_scale(task, self.labels[:, t]) for t, task in enumerate(tasks)]
        self.priors = np.array(
            [
                _logit(p) if task.kind == "binary" else 0.0
                for task, (p, _) in zip(tasks, self.scales, strict=True)
            ],
            np.float32,
        )
        # [E, T] each exposure's place: how often it leads to the event, against all
        places = places_of(np.asarray(impressions.positions))
        rates = place_rates(tasks, places, self.labels)[places]
        self.worth = np.where(np.isnan(rates), 1.0, rates / [p for p, _ in self.scales])

    def rates(self, t: int, group: Array, size: int) -> tuple[Array, Array]:
        """Gives the rates of task t that were known of each row's group when it was asked for [E], and of
        each group in the end [size]; group [E] int64, each below `size`."""
        defined = np.flatnonzero(~np.isnan(self.labels[:, t]))
        given = self.tasks[t].given
        since = self.known[:, self._place(given)] if given else self.times
        values = self.labels[defined, t]
        worth = self.worth[defined, t]
        before_n = self._before(group, defined, since[defined], worth)
        before_s = self._before(group, defined, self.known[defined, t], values)
        n = np.bincount(group[defined], worth, minlength=size)
        s = np.bincount(group[defined], values, minlength=size)
        strength = self._strength(t, before_n[defined], before_s[defined], values, worth)
        return self._rate(t, before_n, before_s, strength), self._rate(t, n, s, strength)

    def exposures(self, group: Array, size: int) -> tuple[Array, Array]:
        """Counts the exposures of each row's group before it is asked for [E], and of each group in the end
        [size]."""
        every = np.arange(len(self.times))
        return self._before(group, every, self.times, np.ones(len(every))), np.bincount(group, minlength=size)

    def _before(self, group: Array, rows: Array, since: Array, values: Array) -> Array:
        """Sums, for each row [E], the `values` of those of `rows` in its group that count since before it is
        asked for; without a clock, of those in the other folds, scaled to all."""
        if not self.has_clock:
            return _in_other_folds(group, self.folds, rows, values)
        return _sums_before(group[rows], since, values, group, self.asked)

    def _strength(self, t: int, n: Array, s: Array, values: Array, worth: Array) -> float:
        """Chooses the strength of the prior that foretells `values` best from what was known before, and from
        what the places are worth."""
        losses = []
        base = _logit(np.clip(self.scales[t][0] * worth, 1e-6, 1 - 1e-6))  # of a binary task
        for strength in _STRENGTHS:
            rate = self._rate(t, n, s, strength)
            if self.tasks[t].kind == "binary":
                logit = rate + base
                losses.append(float((np.logaddexp(0, logit) - values * logit).mean()))
            else:
                mean, spread = self.scales[t]
                losses.append(float(np.square(rate - (values - mean) / spread).mean()))
        return _STRENGTHS[int(np.argmin(losses))] if len(values) else _STRENGTHS[-1]

    def _rate(self, t: int, n: Array, s: Array, strength: float) -> Array:
        p, spread = self.scales[t]
        mean = (s + strength * p) / (n + strength)
        if self.tasks[t].kind == "binary":
            mean = np.clip(mean, 1e-6, 1 - 1e-6)
            rate = _logit(mean) - self.priors[t]
        else:
            rate = (mean - p) / spread
        return np.clip(rate, -_MOST, _MOST).astype(np.float32)

    def _place(self, name: str) -> int:
        return next(t for t, task in enumerate(self.tasks) if task.name == name)


def _logit(p: Any) -> Any:
    return np.log(p / (1 - p))


def _scale(task: Task, labels: Array) -> tuple[float, float]:
    """Gives the rate of all (binary) and 1, or a number's mean and deviation."""
    known = labels[~np.isnan(labels)]
    if task.kind == "binary":
        return float(np.clip(known.mean() if len(known) else 0.5, 1e-4, 1 - 1e-4)), 1.0
    return (float(known.mean()), max(float(known.std()), 1e-6)) if len(known) else (0.0, 1.0)


def _sums_before(group: Array, since: Array, values: Array, asked: Array, times: Array) -> Array:
    """Sums the `values` [R] of each asked group [E] that count since strictly before times [E]; group [R]
    int64 and since [R] int64 say of what, and from when, each value counts."""
    if not len(group):
        return np.zeros(len(asked))
    order = np.lexsort((since, group))
    group, since, sums = group[order], since[order], np.concatenate([[0.0], np.cumsum(values[order])])
    # times become ranks, so that a group and a time fit into one number whatever the clock
    moments = np.unique(since)
    width = len(moments) + 1
    keys = group * width + np.searchsorted(moments, since)
    end = np.searchsorted(keys, asked * width + np.searchsorted(moments, times))
    return sums[end] - sums[np.searchsorted(keys, asked * width)]


def _in_other_folds(group: Array, folds: Array, rows: Array, values: Array) -> Array:
    """Sums, for each row [E], the `values` of those of `rows` in its group but in other folds, times
    folds / (folds - 1): as much as all would weigh."""
    keys, place = np.unique(group * _FOLDS + folds, return_inverse=True)
    by_fold = np.bincount(place[rows], values, minlength=len(keys))
    groups, owner = np.unique(keys // _FOLDS, return_inverse=True)
    total = np.bincount(owner, by_fold, minlength=len(groups))
    return (total[owner] - by_fold)[place] * (_FOLDS / (_FOLDS - 1))

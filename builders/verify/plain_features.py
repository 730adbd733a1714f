"""Makes plain features of impressions, for the baselines: what a table can say, and counts of the past.

Everything is as it was known strictly before the impression's own time: what was shown before, which labels
had come in by then, what the user had taken. A row's own label is in none of its features.

Axes: E impressions, Q those that are asked about, T tasks, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from builders.data.dataset import Dataset, Impressions
from builders.data.spans import FIRST_CLOCK_S
from builders.data.splits import users_of
from ensemble.arrays import Array
from ensemble.schema import Table, Task

SMOOTHING = 10.0  # rows of the average that each rate begins with
_MOST_VALUES = 254  # of a category that boosting tells apart; the rarer ones are one
_DAY_S = 86_400


@dataclass(frozen=True)
class Plain:
    """Holds features of the impressions that were asked about."""

    names: tuple[str, ...]
    values: Array  # [Q, F] float32, NaN where nothing is known
    is_category: Array  # [F] bool
    rates: (
        Array  # [Q, T, 2] float64: smoothed rate (binary) or mean (regression) of the user, and of the item
    )


def joined(parts: tuple[Impressions | None, ...]) -> Impressions:
    """Puts impressions one behind the other: training's, validation's, test's."""
    there = [part for part in parts if part is not None]
    arrays = {
        entry.name: np.concatenate([getattr(part, entry.name) for part in there])
        for entry in fields(Impressions)
        if all(getattr(part, entry.name) is not None for part in there)
    }
    return Impressions(**arrays)


def plain_features(dataset: Dataset, every: Impressions, asked: Array, averages: Array) -> Plain:
    """Makes the features of every[asked]; all of `every` is their past.

    asked [Q] int64, places in `every`; averages [T], each task's in training.
    """
    columns: dict[str, Array] = {}
    rates = []
    for who, keys in (("user", every.user_rows), ("item", every.item_rows)):
        shown, came = _labels_before(every, dataset.schema.tasks, keys, asked)
        rates.append((came + SMOOTHING * averages) / (shown + SMOOTHING))
        for at, task in enumerate(dataset.schema.tasks):
            columns[f"{who}_{task.name}_rows"] = shown[:, at]
            columns[f"{who}_{task.name}_labels"] = came[:, at]
            columns[f"{who}_{task.name}_rate"] = rates[-1][:, at]
    columns |= _of_history(dataset, every, asked) | _of_time(every, asked)
    for who, table, codes, values, rows in (
        ("user", dataset.schema.users, dataset.user_codes, dataset.user_values, every.user_rows[asked]),
        ("item", dataset.schema.items, dataset.item_codes, dataset.item_values, every.item_rows[asked]),
    ):
        columns |= _of_table(who, table, codes[rows], values[rows])
    columns |= _of_list(dataset, every, asked) | _of_context(dataset, every, asked)
    if every.positions.any():
        columns["position"] = np.where(every.positions[asked] > 0, every.positions[asked], np.nan)
    names = tuple(columns)
    is_category = np.array([name.endswith("_category") for name in names], bool)
    matrix = np.stack([columns[name] for name in names], axis=1).astype(np.float32)
    return Plain(names, matrix, is_category, np.stack(rates, axis=2))


def sums_before(keys: Array, times: Array, values: Array, at_keys: Array, at_times: Array) -> Array:
    """Adds up the values of each asked key's rows that lie strictly before each asked time.

    keys, times [n] int64, values [n, V]; at_keys, at_times [Q] int64 -> [Q, V] float64.
    """
    count = len(keys)
    all_keys, all_times = np.concatenate([keys, at_keys]), np.concatenate([times, at_times])
    is_row = np.concatenate([np.ones(count, bool), np.zeros(len(at_keys), bool)])
    order = np.lexsort((is_row, all_times, all_keys))  # at equal times, who asks comes first
    parts = np.concatenate([values, np.zeros((len(at_keys), values.shape[1]))])[order]
    running = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(parts, axis=0)])
    ordered = all_keys[order]
    first = np.searchsorted(ordered, ordered)
    sums = np.empty((len(order), values.shape[1]))
    sums[order] = running[:-1] - running[first]
    return sums[count:]


def _labels_before(
    every: Impressions, tasks: tuple[Task, ...], keys: Array, asked: Array
) -> tuple[Array, Array]:
    """Gives for each asked row how many rows of its key were known to be of each task [Q, T], and the sum of
    the labels that had come in [Q, T].

    A label counts from when it came in, a row of a conditional task from when its condition did. Labels are
    those of the whole log (`settled`): what came in later than a row's part of the split is known to rows
    that come later still.
    """
    at_keys, at_times = keys[asked], every.times[asked]
    labels = every.labels if every.settled is None else every.settled
    place, counts = {task.name: at for at, task in enumerate(tasks)}, []
    for at, task in enumerate(tasks):
        rows = np.flatnonzero(~np.isnan(labels[:, at]))
        since = came = every.times[rows]
        if every.known_times is not None:
            came = every.known_times[rows, at]
            since = every.known_times[rows, place[task.given]] if task.given else since
        ones, told = np.ones((len(rows), 1)), labels[rows, at, None]
        counts.append(
            [
                sums_before(keys[rows], when, of, at_keys, at_times)
                for when, of in ((since, ones), (came, told))
            ]
        )
    shown, summed = (np.concatenate(of, axis=1) for of in zip(*counts, strict=True))
    return shown, summed


def _of_history(dataset: Dataset, every: Impressions, asked: Array) -> dict[str, Array]:
    """Says what the user had taken: how much, how long ago, this item how often and how long ago; and how
    often anybody had taken the item."""
    histories, ends = dataset.histories, every.history_ends[asked]
    users, items, times = every.user_rows[asked], every.item_rows[asked], every.times[asked]
    if not len(histories.item_rows):
        return {}
    lengths = ends - histories.offsets[users]
    pairs = users_of(histories) * (dataset.num_items + 1) + histories.item_rows
    order = np.lexsort((np.arange(len(pairs)), pairs))
    span = len(pairs) + 1
    keys, wanted = pairs[order] * span + order, (users * (dataset.num_items + 1) + items) * span
    low, high = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted + ends)
    last = times_of(histories.times, order[np.maximum(high - 1, 0)], high > low)
    newest = times_of(histories.times, np.maximum(ends - 1, 0), lengths > 0)
    taken = sums_before(
        histories.item_rows, histories.times, np.ones((len(pairs), 1)), every.item_rows[asked], times
    )
    return {
        "history_length": lengths,
        "since_last_event": times - newest,
        "taken_before": high - low,
        "since_taken": times - last,
        "newer_than_taken": np.where(high > low, ends - 1 - order[np.maximum(high - 1, 0)], np.nan),
        "item_taken": taken[:, 0],
    }


def times_of(times: Array, places: Array, is_there: Array) -> Array:
    """Gives times at places [Q] as float64, NaN where there is none."""
    return np.where(is_there, times[places], np.nan)


def _of_time(every: Impressions, asked: Array) -> dict[str, Array]:
    """Says how long ago the item was first shown to anybody; where there is a clock, hour and weekday."""
    times = every.times[asked]
    order = np.lexsort((every.times, every.item_rows))
    first = order[np.searchsorted(every.item_rows[order], every.item_rows[asked])]
    columns = {"item_age": times - every.times[first]}
    if len(times) and every.times.min() >= FIRST_CLOCK_S:
        columns |= {"hour": times // 3600 % 24, "weekday": times // _DAY_S % 7}
    return columns


def _of_list(dataset: Dataset, every: Impressions, asked: Array) -> dict[str, Array]:
    """Says how an item stands in the list that it was shown in, which is what the user saw at that time:
    the list's length, and the place of each of the item's numbers in it, from 0 (least) to 1.

    Nothing where a list has one item.
    """
    order = np.lexsort((every.times, every.user_rows))
    new = np.ones(len(order), bool)
    new[1:] = np.diff(every.user_rows[order]) | np.diff(every.times[order]) != 0
    lists = np.empty(len(order), np.int64)
    lists[order] = np.cumsum(new) - 1
    lengths = np.bincount(lists)
    if len(order) < 2 * len(lengths):
        return {}
    columns = {"list_length": lengths[lists[asked]]}
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for feature in dataset.schema.items.features:
        if feature.kind == "number":
            values = dataset.item_values[every.item_rows, feature.start]
            place = np.empty(len(order))
            place[np.lexsort((values, lists))] = np.arange(len(order))
            share = (place - starts[lists]) / np.maximum(lengths[lists] - 1, 1)
            columns[f"item_{feature.name}_place"] = share[asked]
    return columns


def _of_context(dataset: Dataset, every: Impressions, asked: Array) -> dict[str, Array]:
    """Gives what the exposure's context said."""
    if every.contexts is None:
        return {}
    ending = {"category": "_category", "number": ""}
    return {
        f"context_{feature.name}{ending[feature.kind]}": np.asarray(every.contexts)[asked, at]
        for at, feature in enumerate(dataset.schema.context)
    }


def _of_table(who: str, table: Table, codes: Array, values: Array) -> dict[str, Array]:
    """Gives what the shop's table says: numbers, and the first value of each category."""
    columns: dict[str, Array] = {}
    for feature in table.features:
        if feature.kind == "number":
            columns[f"{who}_{feature.name}"] = values[:, feature.start]
        elif feature.kind == "category":
            code = codes[:, feature.start]
            known = np.minimum(code - feature.offset, _MOST_VALUES)
            columns[f"{who}_{feature.name}_category"] = np.where(code > 0, known, np.nan)
    return columns

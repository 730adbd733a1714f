"""Reads the interactions file: its rows, its labels, and which rows are one impression."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from builders.shop.columns.categories import texts_from_column
from builders.shop.columns.column import Column, Said, distinct_of, first_true, is_textual
from builders.shop.columns.ids import known_ids
from builders.shop.columns.labels import labels_from_column
from builders.shop.columns.numbers import chances_from_column, numbers_from_column, positions_from_column
from builders.shop.columns.times import times_from_column
from builders.shop.parts import NEVER, given_parts
from builders.shop.shop_toml import Shop, ShopTask
from builders.shop.tables import read_table, read_tables
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

_SORTED = 0.9  # share of neighbouring rows of a user whose items' ids ascend, from which a file is sorted
MOST_UNNAMED = 0.5  # share of rows that may lack their user or item; more is no log of who took what


@dataclass(frozen=True)
class Interactions:
    """Holds the file's rows as written; users and items are indices into the sorted distinct ids."""

    user_ids: Array  # [U] S, those that occur
    item_ids: Array  # [I] S, those that occur
    users: Array  # [n] int64
    items: Array  # [n] int64
    times: Array  # [n] int64
    labels: Array  # [n, T] float32, of the row alone; NaN where it says nothing about the task
    event_names: list[str]
    events: Array | None  # [n] int64 into event_names, -1 where empty; None: the shop has no event column
    positions: Array  # [n] int64, where the item was shown, 1 = first; 0 = unknown
    truth: Array | None  # [n, T] float32
    propensities: Array | None = None  # [n] float64, NaN where unknown; None: the shop has no column of them
    # by the place of a task: when each row's label came in, [n] int64, its own time where it has none
    label_times: Mapping[int, Array] = field(default_factory=dict)
    # the whole columns of shop.toml's [context], and the file's row of each of ours [n] int64
    contexts: Mapping[str, Column] = field(default_factory=dict)
    file_rows: Array | None = None
    parts: Array | None = None  # [n] int64: 0 training, 1 validation, 2 test, where the shop itself says it
    said: tuple[Said, ...] = ()  # what each column was taken for
    num_unnamed: int = 0  # rows left out because they name no user or no item

    def __len__(self) -> int:
        return len(self.times)

    def where(self, keep: Array) -> Interactions:
        """Gives the rows where `keep` [n] bool is true; ids stay as they are."""
        if keep.all():
            return self
        events = None if self.events is None else self.events[keep]
        truth = None if self.truth is None else self.truth[keep]
        return Interactions(
            self.user_ids,
            self.item_ids,
            self.users[keep],
            self.items[keep],
            self.times[keep],
            self.labels[keep],
            self.event_names,
            events,
            self.positions[keep],
            truth,
            None if self.propensities is None else self.propensities[keep],
            {task: came[keep] for task, came in self.label_times.items()},
            self.contexts,
            None if self.file_rows is None else self.file_rows[keep],
            None if self.parts is None else self.parts[keep],
            self.said,
            self.num_unnamed,
        )

    def is_event(self, name: str) -> Array:
        """Says which rows are of the event called `name`: [n] bool."""
        assert self.events is not None
        return self.events == (self.event_names.index(name) if name in self.event_names else -2)


def read_interactions(folder: Path, shop: Shop, now_s: float | None = None) -> Interactions:
    """Reads and checks the interactions file; InvalidInput at the first wrong cell."""
    entry = shop.interactions
    columns, file_of = read_tables(
        folder,
        [entry.file, *shop.split.files],
        _columns_of(shop),
        entry.reading,
        (entry.time, *_label_times(shop)),
    )
    num_rows = len(file_of)
    if not num_rows:
        raise InvalidInput(f"{entry.file} has no rows; a shop needs interactions to learn from")
    user_ids, users = known_ids(columns[entry.user])
    item_ids, items = known_ids(columns[entry.item])
    named = (users >= 0) & (items >= 0)
    if not named.all():
        _refuse_mostly_unnamed(columns, entry.user, users < 0, entry.item, items < 0)
        columns = {name: column.where(named) for name, column in columns.items()}
        users, items, file_of = users[named], items[named], file_of[named]
        user_ids, users = _occurring(user_ids, users)
        item_ids, items = _occurring(item_ids, items)
    if len(user_ids) < 2:
        raise InvalidInput(
            f"{entry.file}: all rows are of one user, {user_ids[0].decode()!r}; at least 2 are needed to "
            "learn what users share"
        )
    now_s = clock.time() if now_s is None else now_s
    if entry.time:
        times = times_from_column(columns[entry.time], now_s)
    else:
        times = places_of_rows(users, items, item_ids, columns[entry.item].said)
    names, events = _events(columns[entry.event]) if entry.event else ([], None)
    _check_event_names(shop, names)
    per_task = [_row_labels(task, columns, names, events, len(times)) for task in shop.tasks]
    none = np.zeros(len(times), np.int64)
    return Interactions(
        user_ids,
        item_ids,
        users,
        items,
        times,
        np.stack(per_task, axis=1) if per_task else np.zeros((len(times), 0), np.float32),
        names,
        events,
        positions_from_column(columns[entry.position]) if entry.position else none,
        _read_truth(folder, shop, num_rows, named),
        chances_from_column(columns[entry.propensity]) if entry.propensity else None,
        {
            at: _came_in(columns[task.label.time], labels, times, now_s)
            for at, (task, labels) in enumerate(zip(shop.tasks, per_task, strict=True))
            if task.label and task.label.time
        },
        {one.source: columns[one.source] for one in shop.context_columns},
        np.arange(len(times)) if shop.context else None,
        given_parts(shop.split, columns, times, file_of),
        tuple(column.said for column in columns.values()),
        num_rows - len(times),
    )


def _refuse_mostly_unnamed(
    columns: Mapping[str, Column], user: str, no_user: Array, item: str, no_item: Array
) -> None:
    """Raises InvalidInput where more than MOST_UNNAMED of the rows lack their user, or their item."""
    for name, missing in ((user, no_user), (item, no_item)):
        if missing.mean() > MOST_UNNAMED:
            raise InvalidInput(
                f"{columns[name].place(first_true(missing))}: the id is missing, as in "
                f"{int(missing.sum()):,} of "
                f"{len(missing):,} rows; at most {MOST_UNNAMED:.0%} may lack it (such rows are left out)"
            )


def places_of_rows(users: Array, items: Array, item_ids: Array, said: Said) -> Array:
    """Gives places [n] int64 to rows of a log without times: the file's order, which says what came first.

    Where most of a user's rows follow the items' ids, the file is sorted and its order says nothing: there it
    is a random one, the same for the same file, since last items would all be those with the last ids.
    users, items [n] int64 are rows, the latter of item_ids [I] S.
    """
    places = np.arange(len(users))
    order = np.lexsort((places, users))
    same = (users[order][1:] == users[order][:-1]) & (items[order][1:] != items[order][:-1])
    ranks = [items, _as_numbers(item_ids)[items]]
    ascending = max(float(np.mean(np.diff(rank[order])[same] > 0)) if same.any() else 0.0 for rank in ranks)
    if ascending < _SORTED:
        said.note("the file's order stands for times")
        return places
    said.note(
        f"no times, and {ascending:.0%} of a user's rows follow the items' ids: a random order stands for "
        "times"
    )
    return np.random.default_rng(0).permutation(len(users))


def _as_numbers(ids: Array) -> Array:
    """Gives ids [I] S as numbers [I] float64; zeros where some are none."""
    try:
        return ids.astype(np.float64)
    except ValueError:
        return np.zeros(len(ids))


def _occurring(ids: Array, index: Array) -> tuple[Array, Array]:
    """Gives those ids [K] S that index [n] names, and their places."""
    used, places = np.unique(index, return_inverse=True)
    return ids[used], places.astype(np.int64)


def shown_in_vain(shop: Shop) -> str:
    """Says that rows below a threshold count as shown in vain, with the cure for a shop of ratings; "" where
    shop.toml says what a past is made of."""
    entry, first = shop.interactions, next((task for task in shop.tasks if task.kind == "binary"), None)
    if entry.history or entry.event or not first or not first.label or first.label.threshold is None:
        return ""
    low = f"a row whose {first.label.column!r} is below {first.label.threshold:g}"
    return (
        f"{first.name}: {low} counts as shown in vain and is in no past; where users rate what they had, "
        'write history = "all" in [interactions]'
    )


def known_at_once(shop: Shop) -> str:
    """Says which tasks' labels count as known when their rows happened, with the cure; "" where none does.

    An event has a row and a time of its own; a column has none unless shop.toml names one.
    """
    names = [task.name for task in shop.tasks if task.label and task.label.column and not task.label.time]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: no column says when these labels came, so they count as known at once; where "
        'one comes later, name it: label = {column = "…", time = "…"}'
    )


def _label_times(shop: Shop) -> list[str]:
    return [task.label.time for task in shop.tasks if task.label and task.label.time]


def _columns_of(shop: Shop) -> list[str]:
    """Lists the columns of the interactions that shop.toml names."""
    entry = shop.interactions
    labels = [name for task in shop.tasks if (of := task.label) for name in (of.column, of.time) if name]
    some = filter(None, [entry.time, entry.event, entry.position, entry.propensity, shop.split.column])
    return [entry.user, entry.item, *some, *labels, *[one.source for one in shop.context_columns]]


def _events(column: Column) -> tuple[list[str], Array]:
    """Reads event names: those that there are, and each row's place among them [n] int64, -1 where empty."""
    if not is_textual(column.values.type):
        column = replace(column, values=pa.chunked_array([texts_from_column(column)]))
    texts, index = distinct_of(column.values)
    column.said.what, column.said.missing = f"event names: {len(texts)} distinct", int((index < 0).sum())
    return texts.to_pylist(), index


def _came_in(column: Column, labels: Array, times: Array, now_s: float) -> Array:
    """Reads when labels [n] came in, [n] int64; the row's own time [n] where there is nothing to come."""
    known = column.values.is_valid().to_numpy()
    happened = ~np.isnan(labels) & (labels != 0)
    wrong = first_true(happened & ~known)
    if wrong >= 0:
        raise column.error(wrong, "is no time, but the label has come in; when?")
    if not known.any():
        return times
    filled = column.values.fill_null(column.values.drop_null()[0])
    came = times_from_column(replace(column, values=filled), now_s)
    wrong = first_true(happened & (came < times))
    if wrong >= 0:
        raise column.error(wrong, "is before the row's own time; a label comes in later")
    return np.where(known & happened, came, times)


def _check_event_names(shop: Shop, names: list[str]) -> None:
    entry = shop.interactions
    wanted = [(f"task {t.name!r}", t.label.event) for t in shop.tasks if t.label and t.label.event]
    wanted += (
        [("interactions.history", name) for name in entry.history] if isinstance(entry.history, list) else []
    )
    wanted += [("interactions.impression", entry.impression)] if entry.impression else []
    for who, name in wanted:
        if name not in names:
            there = ", ".join(map(repr, sorted(names)[:10]))
            raise InvalidInput(
                f"{entry.file}: {who} wants the event {name!r}, which no row has; column {entry.event!r} "
                f"holds {there}"
            )


def _row_labels(
    task: ShopTask, columns: dict[str, Column], names: list[str], events: Array | None, num_rows: int
) -> Array:
    """Gives what each row by itself says about `task`: [n] float32, NaN for nothing."""
    label = task.label
    if label is None:
        return np.full(num_rows, np.nan, np.float32)
    if label.event is not None:
        assert events is not None  # shop.toml was checked: an event label needs an event column
        return (events == names.index(label.event)).astype(np.float32)
    assert label.column is not None
    column = columns[label.column]
    is_choice = task.kind == "binary" and label.threshold is None
    numbers = labels_from_column(column) if is_choice else numbers_from_column(column)
    known = ~np.isnan(numbers)
    if task.kind == "binary":
        if label.threshold is not None:
            numbers = np.where(known, numbers >= label.threshold, np.nan)
        wrong = first_true(known & (numbers != 0) & (numbers != 1))
        if wrong >= 0:
            raise column.error(
                wrong,
                f"is neither 0 nor 1; task {task.name!r} is binary: give its label a threshold or make it a "
                "regression",
            )
    if label.log1p:
        wrong = first_true(known & (numbers < 0))
        if wrong >= 0:
            raise column.error(wrong, f"is negative; log1p of task {task.name!r} wants 0 or more")
        numbers = np.log1p(numbers)
    return numbers.astype(np.float32)


def _read_truth(folder: Path, shop: Shop, num_rows: int, named: Array) -> Array | None:
    """Reads the true values of a generated shop's rows, of those that are `named` [num_rows] bool."""
    file = shop.interactions.truth
    if file is None or not shop.tasks:
        return None
    columns = read_table(folder, file, [task.name for task in shop.tasks])
    truth = np.stack([numbers_from_column(columns[task.name]) for task in shop.tasks], axis=1).astype(
        np.float32
    )
    if len(truth) != num_rows:
        raise InvalidInput(
            f"{file} has {len(truth)} rows, {shop.interactions.file} {num_rows}; they must be aligned: "
            "generate the shop again"
        )
    return truth[named]


@dataclass(frozen=True)
class Exposures:
    """Holds what was shown to whom, in time order, and what became of it."""

    rows: Array  # [E] int64 into the interactions: the row that is the exposure
    labels: Array  # [E, T] float32, NaN where a task is not defined
    positions: Array  # [E] int64, the place where the exposure's row shows the item, 1 = first; 0 = unknown
    known_times: Array  # [E, T] int64, when each label came in; the exposure's time where it is 0 or NaN
    propensities: Array | None  # [E] float64, NaN where unknown


@dataclass(frozen=True)
class Periods:
    """Says for each row of the interactions when its user's validation and test begin: [n] int64 each."""

    validation: Array
    test: Array

    def of(self, rows: Array, times: Array) -> Array:
        """Gives the period of times [m] for the users of rows [m]: 0 training, 1 validation, 2 test."""
        return (times >= self.validation[rows]).astype(np.int64) + (times >= self.test[rows])

    def ends(self, rows: Array, times: Array, last: int) -> Array:
        """Gives when the period of times [m] ends; the log's end (its `last` time) ends every one."""
        begins = (self.validation[rows], self.test[rows])
        found = np.where(times < begins[0], begins[0], np.where(times < begins[1], begins[1], last + 1))
        return np.minimum(found, last + 1)


def exposures_from_interactions(
    shop: Shop, interactions: Interactions, periods: Periods | None = None
) -> Exposures:
    """Makes one exposure of each row; with an event column, rows of one exposure are brought together.

    With `impression = "view"`, a view is an exposure and the user's later events on that item, up to its next
    view, label it (events without a view before them form no exposure); those that come later than a label's
    `within` do not. Without it, rows of the same user, item and time are one. A task's label is the largest
    that its rows give; where the task it is `given` did not happen, it is NaN.

    A label of a column with a `time` counts likewise by when it came in.

    With `periods` a label comes from its exposure's own period only: what came later was not known then. A
    label whose `within` is not over when its period ends is censored: NaN whatever happened until then, since
    to keep the early ones would make them look more frequent than they are.
    """
    rows, labels = np.arange(len(interactions)), _timed(shop, interactions, periods)
    known = _known_times(interactions)
    if interactions.events is not None and len(interactions):
        rows, labels, known = _grouped(shop, interactions, labels, periods)
    order = np.argsort(interactions.times[rows], kind="stable")
    rows, labels, known = rows[order], labels[order].copy(), known[order]
    place = {task.name: at for at, task in enumerate(shop.tasks)}
    for at, task in enumerate(shop.tasks):
        if task.given:
            labels[labels[:, place[task.given]] != 1, at] = np.nan
    if periods is None:
        _refuse_labels_nobody_has(shop, labels)
    chances = interactions.propensities
    chances = None if chances is None else chances[rows]
    return Exposures(rows, labels, interactions.positions[rows], known, chances)


def _known_times(interactions: Interactions) -> Array:
    """Gives when each row's labels came in [n, T] int64: with the row, where no column says it."""
    known = np.repeat(interactions.times[:, None], interactions.labels.shape[1], axis=1)
    for task, came in interactions.label_times.items():
        known[:, task] = came
    return known


def _timed(shop: Shop, interactions: Interactions, periods: Periods | None) -> Array:
    """Gives the labels of rows [n, T], those of columns with a time as they were known in time."""
    if not interactions.label_times:
        return interactions.labels
    labels, times = interactions.labels.copy(), interactions.times
    rows, windows = np.arange(len(times)), dict(_windows(shop))
    last = max(int(of.max()) for of in (times, *interactions.label_times.values()))
    for task, came in interactions.label_times.items():
        within = windows.get(task, NEVER)
        is_late = came - times > within
        if periods is not None:
            ends = periods.ends(rows, times, last)
            is_late |= came >= ends
        nothing = 0 if shop.tasks[task].kind == "binary" else np.nan
        labels[is_late & ~np.isnan(labels[:, task]), task] = nothing
        if periods is not None and task in windows:
            labels[within >= ends - times, task] = np.nan
    return labels


def _grouped(
    shop: Shop, interactions: Interactions, row_labels: Array, periods: Periods | None
) -> tuple[Array, Array, Array]:
    """Gives the first row of each exposure [E], its labels [E, T] and when each came in [E, T]; row_labels
    [n, T]."""
    users, items, times = interactions.users, interactions.items, interactions.times
    impression = shop.interactions.impression
    shows = interactions.is_event(impression) if impression else np.zeros(len(times), bool)
    order = np.lexsort((~shows, times, items, users))
    users, items, times, shows = users[order], items[order], times[order], shows[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    starts[1:] |= shows[1:] if impression else times[1:] != times[:-1]
    first = np.flatnonzero(starts)
    of = first[np.cumsum(starts) - 1]  # the exposure of each row
    labels = row_labels[order].copy()
    if periods is not None:
        labels[periods.of(order, times) != periods.of(order, times)[of]] = np.nan
    windows = [window for window in _windows(shop) if window[0] not in interactions.label_times]
    for task, within in windows:
        labels[times - times[of] > within, task] = np.nan
    told = labels
    labels = np.fmax.reduceat(told, first, axis=0)
    # the earliest of the rows that give the label
    gives = told == np.repeat(labels, np.diff(np.append(first, len(order))), axis=0)
    known = np.minimum.reduceat(np.where(gives, _known_times(interactions)[order], NEVER), first, axis=0)
    known = np.where(labels > 0, known, times[first][:, None])
    if periods is not None:
        room = periods.ends(order[first], times[first], int(times.max())) - times[first]
        for task, within in windows:
            labels[within >= room, task] = np.nan
    seen = shows[first] if impression else np.ones(len(first), bool)
    return order[first[seen]], labels[seen], known[seen]


def _windows(shop: Shop) -> list[tuple[int, int]]:
    """Lists the tasks whose label must come within a time: (place of the task, seconds)."""
    return [(at, task.label.within) for at, task in enumerate(shop.tasks) if task.label and task.label.within]


def refuse_all_censored(shop: Shop, labels: Array) -> None:
    """Raises InvalidInput for a task of which no label of the training part [E, T] is known in time."""
    for at, within in _windows(shop):
        if len(labels) and np.isnan(labels[:, at]).all():
            raise InvalidInput(
                f"{shop.interactions.file}: no label of task {shop.tasks[at].name!r} is known by the end of "
                f"training: its `within` of {within:,} seconds is as long as that; make it shorter"
            )


def _refuse_labels_nobody_has(shop: Shop, labels: Array) -> None:
    for at, task in enumerate(shop.tasks):
        if task.label is None:
            continue
        known = labels[~np.isnan(labels[:, at]), at]
        source = f"event {task.label.event!r}" if task.label.event else f"column {task.label.column!r}"
        given = f" where {task.given!r} happened" if task.given else ""
        wanting = "1" if task.kind == "binary" and len(known) else ""
        if (wanting and not (known == 1).any()) or not len(known):
            what = f"({source} is {'never 1' if wanting else 'always empty'}{given})"
            raise InvalidInput(
                f"{shop.interactions.file}: nobody has the label of task {task.name!r} {what}; correct its "
                "label or drop it"
            )

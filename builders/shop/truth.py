"""Keeps a generated shop's truth, truth.npz: what any user would do with any item at any time.

It is for tests and reports, and never read by training: `verify` says by it what the shown lists are worth.
`knowable` has the same effects as far as the log of the time before the last tenth (the test) tells them.

Axes: Q rows, N items a row, U users, I items, E events.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from builders.shop.effects import REMEMBERED, Effects, Moment, arrays_of
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

FILE = "truth.npz"
TASKS = ("ctr", "cvr", "dwell")  # axis T of what is planted
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Events:
    """Holds what each user has done, in time order (CSR): user u has items[offsets[u] : offsets[u + 1]]."""

    offsets: Array  # [U + 1] int64
    items: Array  # [E] int64
    times: Array  # [E] int64

    def before(self, users: Array, times: Array, count: int) -> tuple[Array, Array]:
        """Gives the last `count` items before each time, -1 where there are fewer, and their times:
        [Q, count] int64, the newest last."""
        span = int(max(self.times.max(initial=0), times.max(initial=0))) + 1
        owners = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        ends = np.searchsorted(owners * span + self.times, users * span + times)
        places = ends[:, None] - count + np.arange(count)
        inside = places >= self.offsets[users][:, None]
        if not len(self.items):
            return np.full(places.shape, -1, np.int64), np.zeros(places.shape, np.int64)
        places = np.clip(places, 0, len(self.items) - 1)
        return np.where(inside, self.items[places], -1), np.where(inside, self.times[places], 0)


def events_from_log(users: Array, items: Array, times: Array, num_users: int) -> Events:
    """Sorts events by user, those of a user in their order. users, items, times [E], times ascending."""
    order = np.argsort(users, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))])
    return Events(offsets, items[order], times[order])


@dataclass(frozen=True)
class Truth:
    """Holds the planted effects, what of them can be known, and the log that makes a moment."""

    user_ids: Array  # [U] S, in the generator's order
    item_ids: Array  # [I] S
    effects: Effects
    knowable: Effects  # in place of each hidden effect what one could know of it who knew all others
    clicks: Events
    purchases: Events

    def rows_of(self, user_ids: Array, item_ids: Array) -> tuple[Array, Array]:
        """Finds the generator's rows of ids [U'] and [I'] S; -1 where one is unknown."""
        return _rows(self.user_ids, user_ids), _rows(self.item_ids, item_ids)

    def moment(self, users: Array, times: Array) -> Moment:
        """Gives what was true of users [Q] just before times [Q]."""
        clicked, _ = self.clicks.before(users, times, 1)
        last = np.where(clicked[:, 0] >= 0, 1 + self.effects.category[clicked[:, 0]], 0)
        return Moment(last, times, *self.purchases.before(users, times, REMEMBERED))

    def tasks(
        self, users: Array, times: Array, items: Array, positions: Array | None = None, *, known: bool = False
    ) -> Array:
        """Gives the value of each of TASKS [Q, N, 3] for users [Q] at times [Q] and items [Q or 1, N].

        positions as in Effects.tasks; known: as far as one could know.
        """
        effects = self.knowable if known else self.effects
        return effects.tasks(users, items, self.moment(users, times), positions)


def save_truth(truth: Truth, path: Path) -> None:
    """Writes it as one file."""
    parts = {"effects": truth.effects, "knowable": truth.knowable}
    arrays = {f"{part}.{name}": array for part, of in parts.items() for name, array in arrays_of(of).items()}
    known = {name for name in arrays if name.startswith("knowable.")}
    same = {name for name in known if arrays[name] is arrays[name.replace("knowable", "effects")]}
    logs = {"clicks": truth.clicks, "purchases": truth.purchases}
    arrays |= {f"{log}.{name}": array for log, of in logs.items() for name, array in vars(of).items()}
    kept = {name: array for name, array in arrays.items() if name not in same}
    np.savez(path, user_ids=truth.user_ids, item_ids=truth.item_ids, **kept)


def open_truth(path: Path) -> Truth:
    """Reads what save_truth wrote; InvalidInput if it is no such file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        names = [entry.name for entry in fields(Effects)]
        effects = Effects(**{name: arrays[f"effects.{name}"] for name in names})
        knowable = {name: arrays.get(f"knowable.{name}", getattr(effects, name)) for name in names}
        logs = (
            Events(*(arrays[f"{log}.{entry.name}"] for entry in fields(Events)))
            for log in ("clicks", "purchases")
        )
        return Truth(arrays["user_ids"], arrays["item_ids"], effects, Effects(**knowable), *logs)
    except _UNREADABLE as error:
        fault = f"{path} cannot be read as a planted truth ({error}); generate the shop again"
        raise InvalidInput(fault) from error


def _rows(known: Array, ids: Array) -> Array:
    """Finds the place of each of ids [n] in `known` [m], in any order: [n] int64, -1 where there is none."""
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    return np.where(known[order][place] == ids, order[place], -1)

"""Keeps what a release's verified model was worth to each held-out user, and compares two releases by it.

A row is one held-out next item: whose, which, when, the gain of the verified model's list and, where that was
measured, the list's worth (builders/verify/worth.py); or, with no item and no gain, a moment at which several
items were shown, with the worth of the one that the model put first. A row that is in both releases' files
tested both models, so neither had seen it: rows of one test period that lie before the other model's are in
one file only. Worth is compared where both releases have it of enough users, else the gain, NDCG@10.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import ReleaseError

HELD_OUT = "held_out.npy"
FIGURE = "ndcg@10"  # what `gain` is a user's share of
WORTH = "worth"
_COLUMNS = ("user", "item", "time", "gain")
FEWEST_USERS = 30  # fewer resample too few values: a bootstrap's interval is then too narrow


@dataclass(frozen=True)
class Comparison:
    """Says how a new release's verified model does beside another's, on rows that neither had seen.

    All numbers are None where that cannot be told, and `why_not` says why.
    """

    users: int
    before: float | None = None  # the figure of the other release on these rows
    difference: float | None = None  # new minus other
    low: float | None = None  # the 95% interval of the difference
    high: float | None = None
    why_not: str = ""
    figure: str = FIGURE

    @property
    def is_worse(self) -> bool:
        """Says whether the whole interval is below 0."""
        return self.high is not None and self.high < 0

    @property
    def _words(self) -> str:
        """Names the figure in a line."""
        return "the worth of an item shown" if self.figure == WORTH else self.figure.upper()

    def to_json(self) -> dict[str, Any]:
        """Gives it as JSON-able data."""
        return {**asdict(self), "is_worse": self.is_worse}

    def line(self, new: str, other: str) -> str:
        """Says it in a line, with the names of both releases."""
        if self.why_not:
            return f"cannot tell whether {new} is worse than {other}: {self.why_not}"
        return (
            f"{new} against {other} on {self.users:,} users that neither had seen: {self._words} "
            f"{self.difference:+.4f} of {self.before:.4f}, 95% interval [{self.low:+.4f}, {self.high:+.4f}]"
        )


def held_out_rows(
    user_ids: Array, item_ids: Array, times: Array, gains: Array, worth: Array | None = None
) -> Array:
    """Packs held-out rows -> [Q] records.

    ids [Q] S, times [Q] int64 (seconds or positions), gains and worth [Q], NaN where not measured.
    """
    worth = np.full(len(user_ids), np.nan) if worth is None else worth
    kinds = [("user", user_ids.dtype), ("item", item_ids.dtype), ("time", np.int64)]
    rows = np.empty(len(user_ids), [*kinds, ("gain", np.float32), (WORTH, np.float32)])
    for name, column in zip(rows.dtype.names or (), (user_ids, item_ids, times, gains, worth), strict=True):
        rows[name] = column
    return rows


def read_held_out(path: Path) -> Array | None:
    """Reads held_out.npy [Q]; None if the release has none, ReleaseError if it cannot be read."""
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.dtype.names not in (_COLUMNS, (*_COLUMNS, WORTH)):  # older releases have no worth
            raise ValueError(f"its columns are {rows.dtype.names}")
        return rows
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ReleaseError(f"cannot read {path}: {error}", "build the release again") from error


def compare(other: Array | None, new: Array | None, *, same_worth: bool = True) -> Comparison:
    """Compares two releases by the rows that both have: by worth if there are enough of it, else by gain.

    same_worth: whether both measured worth in the same way.
    """
    for which, rows in (("the active one", other), ("the new one", new)):
        if rows is None or not len(rows):
            return Comparison(0, why_not=f"{which} has no results of held-out users")
    assert other is not None
    assert new is not None
    both = [rows.dtype.names is not None and WORTH in rows.dtype.names for rows in (other, new)]
    if same_worth and all(both):
        found = _compare(other, new, WORTH, WORTH)
        if not found.why_not:
            return found
    return _compare(other, new, "gain", FIGURE)


def _compare(other: Array, new: Array, column: str, figure: str) -> Comparison:
    """Compares by one column, on the rows where both have a number in it."""
    known = (rows[np.isfinite(rows[column])] for rows in (other, new))
    (first, second), users = _shared(*known), 0
    if len(first):
        owners = np.unique(first["user"], return_inverse=True)[1]
        users = int(owners.max()) + 1
    if users < FEWEST_USERS:
        return Comparison(
            users,
            why_not=f"{users or 'no'} users have a held-out item in both that neither model had seen; "
            f"{FEWEST_USERS} are needed",
        )
    found = paired_difference(first[column], second[column], owners)
    mean = float(first[column].mean())
    return Comparison(users, mean, found.mean, found.low, found.high, figure=figure)


def _shared(first: Array, second: Array) -> tuple[Array, Array]:
    """Gives the rows that are in both, in the same order: the same user took the same item at the time."""
    kinds = [
        (name, np.promote_types(first.dtype[name], second.dtype[name])) for name in ("user", "item", "time")
    ]
    keys = []
    for rows in (first, second):
        key = np.empty(len(rows), kinds)
        for name, _ in kinds:
            key[name] = rows[name]
        keys.append(key)
    _, at, of = np.intersect1d(keys[0], keys[1], return_indices=True)
    return first[at], second[of]

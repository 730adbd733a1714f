"""Keeps what a release's verified model was worth to each held-out user, and compares two releases by it.

A row is one held-out next item: whose, which, when, and the gain of the verified model's list. A row that is
in both releases' files tested both models, so neither had seen it: rows of one test period that lie before
the other model's are in one file only.
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

    @property
    def is_worse(self) -> bool:
        """Says whether the whole interval is below 0."""
        return self.high is not None and self.high < 0

    def to_json(self) -> dict[str, Any]:
        """Gives it as JSON-able data."""
        return {"figure": FIGURE, **asdict(self), "is_worse": self.is_worse}

    def line(self, new: str, other: str) -> str:
        """Says it in a line, with the names of both releases."""
        if self.why_not:
            return f"cannot tell whether {new} is worse than {other}: {self.why_not}"
        return (
            f"{new} against {other} on {self.users:,} users that neither had seen: {FIGURE.upper()} "
            f"{self.difference:+.4f} of {self.before:.4f}, 95% interval [{self.low:+.4f}, {self.high:+.4f}]"
        )


def held_out_rows(user_ids: Array, item_ids: Array, times: Array, gains: Array) -> Array:
    """Packs held-out rows: ids [Q] S, times [Q] int64 (seconds or positions), gains [Q] -> [Q] records."""
    kinds = [("user", user_ids.dtype), ("item", item_ids.dtype), ("time", np.int64), ("gain", np.float32)]
    rows = np.empty(len(user_ids), kinds)
    for (name, _), column in zip(kinds, (user_ids, item_ids, times, gains), strict=True):
        rows[name] = column
    return rows


def read_held_out(path: Path) -> Array | None:
    """Reads held_out.npy [Q]; None if the release has none, ReleaseError if it cannot be read."""
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.dtype.names != ("user", "item", "time", "gain"):
            raise ValueError(f"its columns are {rows.dtype.names}")
        return rows
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ReleaseError(f"cannot read {path}: {error}", "build the release again") from error


def compare(other: Array | None, new: Array | None) -> Comparison:
    """Compares the gains of two releases' held-out rows, where both have the same row."""
    for which, rows in (("the active one", other), ("the new one", new)):
        if rows is None or not len(rows):
            return Comparison(0, why_not=f"{which} has no results of held-out users")
    assert other is not None
    assert new is not None
    (first, second), users = _shared(other, new), 0
    if len(first):
        owners = np.unique(first["user"], return_inverse=True)[1]
        users = int(owners.max()) + 1
    if users < FEWEST_USERS:
        return Comparison(
            users,
            why_not=f"{users or 'no'} users have a held-out item in both that neither model had seen; "
            f"{FEWEST_USERS} are needed",
        )
    found = paired_difference(first["gain"], second["gain"], owners)
    return Comparison(users, float(first["gain"].mean()), found.mean, found.low, found.high)


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

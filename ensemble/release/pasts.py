"""Tells what users had before the last W items that a snapshot row holds, so that nobody is shown it again.

`older_rows.npy` has these items of all users behind each other, `older_ends.npy` where each user's end. Both
are mapped: a batch reads its own users' pieces, and most users have none. What live events have pushed out of
a row since the release was built is in the release's own row, which is looked at, too. So only who takes more
than W items after a build can be shown one of these again, until the next build.

Axes: B batch, W seen, U users, X items of all users of a batch together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ensemble.arrays import Array
from ensemble.release.release import Release

ENDS, ROWS = "older_ends.npy", "older_rows.npy"
MOST = 10_000  # items a user at most, the newest: each one makes recall look an item deeper


class Older(NamedTuple):
    """Holds what users had before their seen_rows."""

    owners: Array  # [X] int64, places in the batch
    rows: Array  # [X] int64, item rows

    def of(self, users: Array) -> Older:
        """Gives what some users had, by their places [b] in the batch."""
        place = np.full(max(self.owners.max(initial=0), users.max(initial=0)) + 1, -1)
        place[users] = np.arange(len(users))
        mine = place[self.owners]
        return Older(mine[mine >= 0], self.rows[mine >= 0])


class Pasts:
    """Opens what a release knows of older pasts; one that has no such files knows none."""

    def __init__(self, release: Release) -> None:
        self._release, self._rows = release, np.zeros(0, np.int32)
        if not (release.path / ROWS).exists():
            self._ends = np.zeros(0, np.int64)
            return
        release.verify_data(ENDS, ROWS)
        # [U + 1] int64, by user row; [X] int32
        self._ends = np.load(release.path / ENDS, mmap_mode="r", allow_pickle=False)
        self._rows = np.load(release.path / ROWS, mmap_mode="r", allow_pickle=False)

    def older(self, user_ids: Array, seen_rows: Array) -> Older:
        """Gives what users [B] S had before seen_rows [B, W]; nothing of whom the release does not know."""
        users = self._release.user_ids.rows_from_ids(user_ids)
        if not len(self._ends) or not users.any():
            return Older(np.zeros(0, np.int64), np.zeros(0, np.int64))
        owners, places = ragged(
            np.where(users > 0, self._ends[users - 1], 0), np.where(users > 0, self._ends[users], 0)
        )
        full = np.flatnonzero((users > 0) & (seen_rows[:, 0] > 0))  # of others nothing was pushed out
        own = self._release.users["seen"][users[full]].astype(np.int64)
        line, column = np.nonzero(own > 0)
        owners = np.concatenate([owners, full[line]])
        return Older(owners, np.concatenate([self._rows[places].astype(np.int64), own[line, column]]))


def ragged(starts: Array, stops: Array) -> tuple[Array, Array]:
    """Lists the places of the ranges starts to stops [n] int64 behind each other: whose each is, and where,
    [X] int64 each."""
    lengths = np.maximum(stops - starts, 0)
    owners = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return owners, np.arange(len(owners)) - before[owners] + starts[owners]

"""Asking readers for rows as the steps do, and holding the answer against the release's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from random_release import RandomRelease

from ensemble.tiers.reader import RowReaders, Rows


def read_users(readers: RowReaders, release: RandomRelease, users: list[str]) -> Rows:
    ids = np.array([user.encode() for user in users])
    return readers.users.read_users(ids, release.user_ids.rows_from_ids(ids))


def assert_own_rows(found: Rows, release: RandomRelease, users: list[str]) -> None:
    """Each user has the release's row of that user, and of nobody else."""
    rows = release.user_ids.rows_from_ids(np.array([user.encode() for user in users]))
    for name in release.users.dtype.names:
        np.testing.assert_array_equal(found.field(name), release.users[name][rows])


def assert_own_items(found: Rows, release: RandomRelease, rows: np.ndarray) -> None:
    for name in release.items.dtype.names:
        wanted = release.items[name][np.maximum(rows, 0)] * (rows > 0)[..., None]
        np.testing.assert_array_equal(found.field(name), wanted)


def status(rows: Rows) -> list[int]:
    return np.broadcast_to(rows.status_of_users(), len(rows.index)).tolist()


def wait_until(true: Callable[[], object], limit_s: float = 10.0) -> float:
    """Seconds until it was; fails after limit_s."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < limit_s, "did not become true"
        time.sleep(0.002)
    return time.monotonic() - started

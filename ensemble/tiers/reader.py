"""Reads rows of users and items, on one path: L1, then Redis for what L1 has not, then the snapshot, then row
0.

Without Redis (the embedded default) it is the snapshot alone, gathered straight from the mapped file.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ensemble.arrays import Array
from ensemble.contract import Degraded
from ensemble.release.release import Release
from ensemble.release.snapshot import gather
from ensemble.telemetry import Metric
from ensemble.tiers.memory import FRESH, MISS, Lookup, MemoryTier
from ensemble.tiers.past import merge_past
from ensemble.tiers.records import RowFormat, item_identities, row_format, user_identities
from ensemble.tiers.redis_tier import RedisTier
from ensemble.tiers.settings import TierSettings, settings_from_environment

# As plain numbers: NumPy takes long over enums
_STALE, _MISSING = int(Degraded.FEATURES_STALE), int(Degraded.FEATURES_MISSING)
# Rows of a read; beyond it, copying a row twice costs more than finding out that it is there twice.
_DISTINCT_ABOVE = 2048


@dataclass(frozen=True)
class Rows:
    """Holds rows that were read: where they are, and how well they are known."""

    table: Array  # packed rows
    index: Array  # [...] int64 into table; -1: padding
    status: Array | None = None  # [...] int64, bits of Degraded; None: all is well
    known: Array | None = None  # [...] bool, a row of its own was found; None: ask the snapshot's id map
    in_order: bool = False  # index is 0, 1, 2, …

    def field(self, name: str) -> Array:
        """Gives a field of the rows: [..., width] contiguous; 0 where padded."""
        if self.in_order:
            return np.ascontiguousarray(self.table[name]).reshape(*self.index.shape, -1)
        return gather(self.index, self.table, name)

    def at(self, *places: Array) -> Rows:
        """Picks some of the rows, in another order."""
        return Rows(self.table, self.index[places])

    def status_of_users(self) -> Array | int:
        """Joins each user's bits: [B] int64, or 0 where all is well."""
        if self.status is None:
            return 0
        return np.bitwise_or.reduce(self.status.reshape(len(self.status), -1), axis=1)


class RowReader:
    """Reads one table of one release."""

    def __init__(
        self, table: Array, row_format: RowFormat | None = None, redis: RedisTier | None = None
    ) -> None:
        """Opens the readers' tiers: `table` [n + 1] packed is the snapshot's.

        Without `redis` and its `row_format` nothing else is read.
        """
        self.table, self.format, self.redis = table, row_format, redis
        self.snapshot_rows = self.stale_rows = self.missing_rows = 0
        self._refill, self._refills = threading.Lock(), 0
        if redis and row_format:
            self.memory = MemoryTier(row_format.row, redis.settings)
            redis.attach(row_format.table, self.memory)

    def read_items(self, rows: Array) -> Rows:
        """Reads the items at rows [...] int64; -1 where padded, 0 for one that nobody knows."""
        if self.redis is None:
            return Rows(self.table, rows)
        if rows.size > _DISTINCT_ABOVE or not (rows > 0).all():
            return self._read_distinct(rows)
        packed, status, known = self._read(item_identities(rows.ravel()), rows.ravel())
        places = np.arange(rows.size).reshape(rows.shape)
        return Rows(packed, places, status.reshape(rows.shape), known.reshape(rows.shape), in_order=True)

    def _read_distinct(self, rows: Array) -> Rows:
        """Does read_items() with each row asked for once, and none for padding or what nobody knows."""
        flat, index = np.unique(rows, return_inverse=True)
        first = int(np.searchsorted(flat, 1))
        flat, index = flat[first:], index.reshape(rows.shape) - first
        unknown = rows == 0
        if not len(flat):
            return Rows(self.table, rows)
        packed, status, known = self._read(item_identities(flat), flat)
        index = np.where(rows > 0, index, -1)
        status, known = np.where(index < 0, 0, status[index]), (index >= 0) & known[index]
        if unknown.any():
            index[unknown], packed = len(packed), np.concatenate([packed, self.table[:1]])
        return Rows(packed, index, status, known)

    def read_users(self, ids: Array, rows: Array) -> Rows:
        """Reads the users with ids [B] S, whose snapshot rows [B] int64 are 0 where it has none."""
        if self.redis is None:
            return Rows(self.table, rows)
        packed, status, known = self._read(user_identities(ids), rows)
        return Rows(packed, np.arange(len(packed)), status, known, in_order=True)

    def _read(self, identities: Array, rows: Array) -> tuple[Array, Array, Array]:
        """Reads identities [n, 2] with snapshot rows [n] -> packed rows, bits int64, known bool, each [n]."""
        refills = self._refills
        looked = self.memory.get(identities)
        fresh = looked.state == FRESH
        if fresh.all() and not looked.absent.any() and not looked.refresh.any():
            return looked.rows, np.zeros(len(rows), np.int64), fresh
        assert self.redis is not None
        # Absent: Redis says that it has none; unsure: it did not say
        packed, absent, unsure = looked.rows, looked.absent, ~fresh
        ask = np.flatnonzero((looked.state == MISS) | looked.refresh)
        if len(ask):
            first, inverse = _distinct(identities[ask])
            answered = self._ask(identities, rows, ask[first], looked, refills)[inverse]
            if len(first) < len(ask):
                packed[ask], absent[ask] = packed[ask[first][inverse]], absent[ask[first][inverse]]
            unsure[ask] &= ~answered
        if self.redis.tracker.connected:  # it would have told if a row in memory had changed
            unsure &= looked.state == MISS
        held = (looked.state != MISS) | ~unsure
        return self._filled(packed, rows, held & ~absent, unsure)

    def _ask(self, identities: Array, rows: Array, ask: Array, looked: Lookup, refills: int) -> Array:
        """Asks Redis for the distinct identities[ask] and puts what it says into `looked` and L1.

        Gives [len(ask)] bool: what it spoke of. One thread a table at a time; who had to wait finds in L1
        what the other has brought, and asks only for the rest.
        """
        assert self.redis is not None
        assert self.format is not None
        answered, stamp = np.zeros(len(ask), bool), looked.stamp
        with self._refill:
            ends = time.monotonic() + self.redis.settings.deadline_ms / 1000
            if self.redis.catch_up(ends) or self._refills != refills:
                again = self.memory.peek(identities[ask])
                stamp, answered = again.stamp, again.state == FRESH
                there = ask[answered]
                looked.rows[there], looked.absent[there] = again.rows[answered], again.absent[answered]
            rest = np.flatnonzero(~answered)
            fetched = self.redis.fetch(self.format, identities[ask[rest]], stamp, ends) if len(rest) else None
            if fetched is not None:
                valid = np.flatnonzero(fetched.good | fetched.absent)
                at = ask[rest[valid]]
                answered[rest[valid]] = True
                looked.rows[at], looked.absent[at] = fetched.rows[valid], fetched.absent[valid]
                self._complete(looked.rows, rows, at[fetched.partial[valid]])
                self.memory.put(identities[at], looked.rows[at], looked.absent[at], stamp)
                self._refills += 1
        return answered

    def _complete(self, packed: Array, rows: Array, partial: Array) -> None:
        """Puts the snapshot's row of a user before the events that packed[partial] hold alone.

        Its row in Redis had been evicted. Rare.
        """
        for n in partial[(rows[partial] > 0) & (rows[partial] < len(self.table))].tolist():
            events = packed[n].copy()
            packed[n] = self.table[rows[n]]
            late = np.flatnonzero(events["seen"] > 0)
            times = np.full(len(events["seen"]), -np.inf)
            merge_past(
                packed[n], times, events["seen"][late], events["seen_kinds"][late], np.arange(len(late))
            )
            own = packed[n]["seen_times"]
            own[len(own) - len(late) :] = events["seen_times"][late]

    def _filled(self, packed: Array, rows: Array, held: Array, unsure: Array) -> tuple[Array, Array, Array]:
        """Puts the snapshot's rows, and the default row, where no tier above holds one.

        Gives the rows, what that means for the answer (bits [n] int64), and known [n] bool.
        """
        in_snapshot = (rows > 0) & (rows < len(self.table))
        left = np.flatnonzero(~held)
        if len(left):
            packed[left] = self.table[np.where(in_snapshot[left], rows[left], 0)]
        known = held | in_snapshot
        status = np.where(unsure, np.where(known, _STALE, _MISSING), 0)
        self.snapshot_rows += len(left)
        self.stale_rows += int((unsure & known).sum())
        self.missing_rows += int((unsure & ~known).sum())
        return packed, status, known

    def metrics(self) -> list[Metric]:
        """Lists L1's and the snapshot's numbers."""
        if self.redis is None or self.format is None:
            return []
        c = self.memory.counters
        memory, snapshot = ((("tier", name), ("table", self.format.table)) for name in ("memory", "snapshot"))
        return [
            Metric("peregrine_tier_hits", memory, c.hits),
            Metric("peregrine_tier_misses", memory, c.misses),
            Metric("peregrine_tier_stale", memory, c.stale),
            Metric("peregrine_tier_negative_hits", memory, c.negative_hits),
            Metric("peregrine_tier_evictions", memory, c.evictions),
            Metric("peregrine_tier_invalidations", memory, c.invalidations),
            Metric("peregrine_tier_memory_bytes", memory, self.memory.bytes, is_counter=False),
            Metric(
                "peregrine_tier_memory_max_bytes",
                memory,
                self.memory.max_rows * self.memory.slot_bytes,
                is_counter=False,
            ),
            Metric("peregrine_tier_hits", snapshot, self.snapshot_rows - self.missing_rows),
            Metric("peregrine_tier_misses", snapshot, self.missing_rows),
            Metric("peregrine_tier_stale", snapshot, self.stale_rows),
        ]


def _distinct(identities: Array) -> tuple[Array, Array]:
    """Finds the distinct ones of identities [n, 2]: where each stands first [d], and which of them each is
    [n]."""
    order = np.lexsort((identities[:, 1], identities[:, 0]))
    ordered = identities[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


class RowReaders:
    """Holds the readers of a release's users and items, with one way to Redis between them.

    Each is opened when it is first asked for.
    """

    def __init__(self, release: Release, settings: TierSettings | None = None) -> None:
        """Connects as `settings` say; None: as PEREGRINE_TIERS says, and the snapshot alone without it."""
        settings = settings or settings_from_environment()
        self.redis = RedisTier(settings, release.schema.shop, release.name) if settings else None
        self._release = release
        self._opened: list[RowReader] = []

    @cached_property
    def users(self) -> RowReader:
        """Reads users' rows."""
        return self._open("users", self._release.users)

    @cached_property
    def items(self) -> RowReader:
        """Reads items' rows."""
        return self._open("items", self._release.items)

    def _open(self, table: str, rows: Array) -> RowReader:
        self._opened.append(
            RowReader(rows, row_format(self._release, table) if self.redis else None, self.redis)
        )
        return self._opened[-1]

    def close(self) -> None:
        """Ends the way to Redis."""
        if self.redis:
            self.redis.close()

    def metrics(self) -> list[Metric]:
        """Lists every tier's numbers; none without Redis."""
        return [
            *(one for reader in self._opened for one in reader.metrics()),
            *(self.redis.metrics() if self.redis else ()),
        ]

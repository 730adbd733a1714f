"""The one read path for rows of users and items: L1, then Redis for all that L1 has not, then the release's
snapshot, then row 0.

Without Redis (the embedded default) it is the snapshot alone, gathered straight from the mapped file.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ensemble.contract import Degraded
from ensemble.release.release import Release
from ensemble.release.snapshot import gather
from ensemble.telemetry import Metric
from ensemble.tiers.memory import FRESH, MISS, Lookup, MemoryTier
from ensemble.tiers.past import merge_past
from ensemble.tiers.records import RowFormat, item_identities, row_format, user_identities
from ensemble.tiers.redis_tier import RedisTier
from ensemble.tiers.settings import TierSettings, settings_from_environment

# as plain numbers: NumPy takes long over enums
_STALE, _MISSING = (
    int(Degraded.FEATURES_STALE),
    int(Degraded.FEATURES_MISSING),
)
# rows: beyond it copying a row twice costs more than finding out that it is there twice
_DISTINCT_ABOVE = 2048


@dataclass(frozen=True)
class Rows:
    """Rows that were read. Where they are, and how well they are known."""

    table: np.ndarray  # packed rows
    index: np.ndarray  # [...] int64 into table; -1: padding
    status: np.ndarray | None = None  # [...] int64, bits of Degraded; None: all is well
    known: np.ndarray | None = None  # [...] bool, a row of its own was found; None: ask the snapshot's id map
    in_order: bool = False  # index is 0, 1, 2, …

    def field(self, name: str) -> np.ndarray:
        """[..., width] contiguous; 0 where padded."""
        if self.in_order:
            return np.ascontiguousarray(self.table[name]).reshape(*self.index.shape, -1)
        return gather(self.index, self.table, name)

    def at(self, *places: np.ndarray) -> Rows:
        """Some of them, in another order."""
        return Rows(self.table, self.index[places])

    def status_of_users(self) -> np.ndarray | int:
        """[B] int64: each line's bits together."""
        if self.status is None:
            return 0
        return np.bitwise_or.reduce(self.status.reshape(len(self.status), -1), axis=1)


class RowReader:
    """Reads one table of one release."""

    def __init__(
        self, table: np.ndarray, row_format: RowFormat | None = None, redis: RedisTier | None = None
    ) -> None:
        """`table` [n + 1] packed is the snapshot's; without `redis` and its `row_format` nothing else is
        read."""
        self.table, self.format, self.redis = table, row_format, redis
        self.snapshot_rows = self.stale_rows = self.missing_rows = 0
        self._refill, self._refills = threading.Lock(), 0
        if redis and row_format:
            self.memory = MemoryTier(row_format.row, redis.settings)
            redis.attach(row_format.table, self.memory)

    def read_items(self, rows: np.ndarray) -> Rows:
        """rows [...] int64, -1 or 0 where padded."""
        if self.redis is None:
            return Rows(self.table, rows)
        flat, index = rows.ravel(), np.arange(rows.size)
        in_order = len(flat) <= _DISTINCT_ABOVE and bool((flat > 0).all())
        if not in_order:
            flat, index = np.unique(flat, return_inverse=True)
            first = int(np.searchsorted(flat, 1))  # what is padding or unknown is nobody's row
            flat, index = flat[first:], np.maximum(index - first, -1)
            if not len(flat):
                return Rows(self.table, np.full(rows.shape, -1))
        found, status, known = self._read(item_identities(flat), flat)
        index = index.reshape(rows.shape)
        if in_order:
            return Rows(found, index, status.reshape(rows.shape), known.reshape(rows.shape), in_order)
        return Rows(found, index, np.where(index < 0, 0, status[index]), (index >= 0) & known[index])

    def read_users(self, ids: np.ndarray, rows: np.ndarray) -> Rows:
        """ids [B] S and the snapshot's rows [B] int64 of them, 0 where it has none."""
        if self.redis is None:
            return Rows(self.table, rows)
        found, status, known = self._read(user_identities(ids), rows)
        return Rows(found, np.arange(len(found)), status, known, in_order=True)

    def _read(self, identities: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Identities [n, 2] and their snapshot rows [n] -> packed rows [n], bits [n] int64, known [n]
        bool."""
        refills = self._refills
        looked = self.memory.get(identities)
        fresh = looked.state == FRESH
        if fresh.all() and not looked.absent.any():
            return looked.rows, np.zeros(len(rows), np.int64), fresh
        # absent: Redis says that it has none; unsure: it did not say
        found, absent, unsure = (
            looked.rows,
            looked.absent,
            ~fresh,
        )
        ask = np.flatnonzero((looked.state == MISS) | looked.refresh)
        if len(ask):
            first, inverse = _distinct(identities[ask])
            said = self._ask(identities, rows, ask[first], looked, refills)[inverse]
            found[ask], absent[ask] = found[ask[first][inverse]], absent[ask[first][inverse]]
            unsure[ask] = ~said
        held = (looked.state != MISS) | ~unsure
        return self._filled(found, rows, held & ~absent, unsure)

    def _ask(
        self, identities: np.ndarray, rows: np.ndarray, ask: np.ndarray, looked: Lookup, refills: int
    ) -> np.ndarray:
        """Asks Redis for the distinct identities[ask] and puts what it says into looked and L1 -> [len(ask)]
        bool, what it spoke of.

        One thread a table at a time; who had to wait finds in L1 what the other has brought, and asks only
        for the rest.
        """
        assert self.redis is not None
        assert self.format is not None
        said, stamp = np.zeros(len(ask), bool), looked.stamp
        with self._refill:
            if self._refills != refills:
                again = self.memory.peek(identities[ask])
                stamp, said = again.stamp, again.state == FRESH
                looked.rows[ask[said]], looked.absent[ask[said]] = again.rows[said], again.absent[said]
            rest = np.flatnonzero(~said)
            fetched = self.redis.fetch(self.format, identities[ask[rest]]) if len(rest) else None
            if fetched is not None:
                told = np.flatnonzero(fetched.good | fetched.absent)
                at = ask[rest[told]]
                said[rest[told]] = True
                looked.rows[at], looked.absent[at] = fetched.rows[told], fetched.absent[told]
                self._complete(looked.rows, rows, at[fetched.partial[told]])
                self.memory.put(identities[at], looked.rows[at], looked.absent[at], stamp)
                self._refills += 1
        return said

    def _complete(self, found: np.ndarray, rows: np.ndarray, partial: np.ndarray) -> None:
        """Puts the snapshot's row of a user before the events that found[partial] hold alone: its row in
        Redis had been evicted. Rare."""
        for n in partial[(rows[partial] > 0) & (rows[partial] < len(self.table))].tolist():
            events = found["seen"][n].copy()
            found[n] = self.table[rows[n]]
            late = events[events > 0]
            found["seen"][n] = merge_past(
                found["seen"][n], np.full(len(events), -np.inf), late, np.arange(len(late))
            )[0]

    def _filled(
        self, found: np.ndarray, rows: np.ndarray, held: np.ndarray, unsure: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Puts the snapshot's rows, and the default row, where no tier above holds one; says what that means
        for the answer."""
        in_snapshot = (rows > 0) & (rows < len(self.table))
        left = np.flatnonzero(~held)
        if len(left):
            found[left] = self.table[np.where(in_snapshot[left], rows[left], 0)]
        known = held | in_snapshot
        status = np.where(unsure, np.where(known, _STALE, _MISSING), 0)
        self.snapshot_rows += len(left)
        self.stale_rows += int((unsure & known).sum())
        self.missing_rows += int((unsure & ~known).sum())
        return found, status, known

    def metrics(self) -> list[Metric]:
        """L1's and the snapshot's numbers."""
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


def _distinct(identities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] -> where each distinct one stands first [d], and which of them each is [n]."""
    order = np.lexsort((identities[:, 1], identities[:, 0]))
    ordered = identities[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


class RowReaders:
    """The readers of a release's users and items, with one way to Redis between them; each is opened when it
    is first asked for."""

    def __init__(self, release: Release, settings: TierSettings | None = None) -> None:
        """`settings` None: as PEREGRINE_TIERS says; the snapshot alone without it."""
        settings = settings or settings_from_environment()
        self.redis = RedisTier(settings, release.schema.shop, release.name) if settings else None
        self._release = release
        self._opened: list[RowReader] = []

    @cached_property
    def users(self) -> RowReader:
        return self._open("users", self._release.users)

    @cached_property
    def items(self) -> RowReader:
        return self._open("items", self._release.items)

    def _open(self, table: str, rows: np.ndarray) -> RowReader:
        self._opened.append(
            RowReader(rows, row_format(self._release, table) if self.redis else None, self.redis)
        )
        return self._opened[-1]

    def close(self) -> None:
        if self.redis:
            self.redis.close()

    def metrics(self) -> list[Metric]:
        """Every tier's numbers; nothing without Redis."""
        return [
            *(one for reader in self._opened for one in reader.metrics()),
            *(self.redis.metrics() if self.redis else ()),
        ]

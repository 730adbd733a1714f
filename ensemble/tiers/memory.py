"""Keeps rows in this process (L1), in a set-associative table of NumPy arrays; works on whole batches.

The table is bounded in bytes and in age. It has four ways a set; within a set the least recently used row
goes. Ages are of a monotonic clock. An invalidation also stops rows that were read before it and come to be
put in after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array, ranks_within
from ensemble.tiers.settings import TierSettings

WAYS = 4
# Of the time for which a row is believed: afterwards it is asked for again, so that a call to Redis that
# takes long once in a while makes nothing stale
_EARLY = 0.75
# STALE: past its soft TTL, to be used only if nothing newer can be had
MISS, FRESH, STALE = 0, 1, 2
# 2^64 / golden ratio: neighbouring item rows go to distant sets (Knuth 6.4)
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class MemoryCounters:
    """Counts what happened since the start."""

    hits: int = 0
    misses: int = 0
    stale: int = 0
    negative_hits: int = 0
    evictions: int = 0
    invalidations: int = 0


@dataclass(frozen=True)
class Lookup:
    """Holds what L1 knows of n identities.

    state [n] int8: MISS, FRESH or STALE. absent [n] bool: Redis has none, use the snapshot. refresh [n] bool:
    the caller, and nobody else for now, is to ask Redis again. rows [n] packed, garbage where state is MISS
    or absent.
    """

    state: Array
    absent: Array
    refresh: Array
    rows: Array
    stamp: int  # give it to put(): what was invalidated since is not put in


class MemoryTier:
    """Maps an identity [2] uint64 to its packed row, or to "absent".

    Identity (0, 0) means empty and must not be asked for.
    """

    def __init__(
        self,
        dtype: np.dtype,
        settings: TierSettings,
        *,
        refresh_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.settings, self.refresh_s, self.clock = settings, refresh_s, clock
        self.slot_bytes = dtype.itemsize + 16 + 3 * 8 + 8 + 1 + 8 // WAYS
        sets = max(1, settings.memory_bytes // (WAYS * self.slot_bytes))
        self.num_sets = 1 << (sets.bit_length() - 1)  # a power of two at most the bound
        slots = self.num_sets * WAYS
        self._low, self._high = np.zeros(slots, np.uint64), np.zeros(slots, np.uint64)  # words of identities
        self._sets = self._low.reshape(self.num_sets, WAYS)
        self._rows = np.zeros(slots, dtype)  # pages that are never written are never allocated
        self._soft, self._hard, self._claim = np.zeros(slots), np.zeros(slots), np.zeros(slots)
        self._early = np.zeros(slots)  # from when on a row is asked for again, while it is still believed
        self._used = np.zeros(slots, np.int64)
        self._absent = np.zeros(slots, bool)
        self._invalidated = np.zeros(self.num_sets, np.int64)
        self._tick, self._flushed = 0, 0
        self._lock = threading.Lock()
        self._random = np.random.default_rng(seed)
        self.counters = MemoryCounters()

    @property
    def max_rows(self) -> int:
        """Gives how many rows fit."""
        return self.num_sets * WAYS

    @property
    def bytes(self) -> int:
        """Gives the size of the rows that are in, and of what is kept beside them."""
        return int(np.count_nonzero(self._hard)) * self.slot_bytes

    def get(self, identities: Array) -> Lookup:
        """Looks identities [n, 2] up, counts them, and claims those that are to be asked for again."""
        with self._lock:
            now = self.clock()
            slots, found, stale, absent = self._look(identities, now)
            refresh = found & (self._early[slots] <= now)
            if refresh.any():
                refresh &= self._claim[slots] <= now
                self._claim[slots[refresh]] = now + self.refresh_s
            hits = int(np.count_nonzero(found))
            self._used[slots if hits == len(slots) else slots[found]] = self._tick
            self._count(len(slots), hits, stale, absent)
            return Lookup(found.astype(np.int8) + stale, absent, refresh, self._rows.take(slots), self._tick)

    def peek(self, identities: Array) -> Lookup:
        """Looks identities [n, 2] up as get() does, but counts, uses and claims nothing."""
        with self._lock:
            slots, found, stale, absent = self._look(identities, self.clock())
            return Lookup(
                found.astype(np.int8) + stale,
                absent,
                np.zeros(len(slots), bool),
                self._rows.take(slots),
                self._tick,
            )

    def _look(self, identities: Array, now: float) -> tuple[Array, Array, Array, Array]:
        """Gives slots [n] of identities [n, 2], and which are found, stale and absent [n] bool."""
        self._tick += 1
        slots, found = self._find(identities)
        found &= self._hard[slots] > now
        return slots, found, found & (self._soft[slots] <= now), found & self._absent[slots]

    def put(self, identities: Array, rows: Array, absent: Array, stamp: int) -> None:
        """Puts in the rows [n] of distinct identities [n, 2], or that there is none where absent [n].

        `stamp` is that of the get before it.
        """
        with self._lock:
            if stamp < self._flushed:
                return
            self._tick += 1
            slots, there = self._find(identities)
            valid = self._invalidated[slots // WAYS] <= stamp
            # In their places: no newcomer of this call takes those
            self._used[slots[there & valid]] = self._tick
            slots, chosen = self._places(slots, there, valid)
            slots, rows, absent = slots[chosen], rows[chosen], absent[chosen]
            self._low[slots], self._high[slots] = identities[chosen].T
            self._rows[slots], self._absent[slots] = rows, absent
            self._used[slots] = self._tick
            now, ttl = self.clock(), self.settings
            # Only ever shorter: a TTL is a promise
            short = 1 - ttl.jitter * self._random.random((2, len(slots)))
            self._soft[slots] = now + np.where(absent, ttl.negative_ttl_s, ttl.soft_ttl_s) * short[0]
            self._early[slots] = now + _EARLY * (self._soft[slots] - now)
            self._hard[slots] = now + np.where(
                absent, ttl.negative_ttl_s * short[0], ttl.hard_ttl_s * short[1]
            )
            self._claim[slots] = 0

    def drop(self, identities: Array) -> None:
        """Invalidates identities [n, 2], also for gets that are under way."""
        with self._lock:
            self._tick += 1
            slots, found = self._find(identities)
            self._invalidated[slots // WAYS] = self._tick
            self._clear(slots[found])
            self.counters.invalidations += len(identities)

    def flush(self) -> None:
        """Forgets everything, also what gets that are under way will bring."""
        with self._lock:
            self._tick += 1
            self._flushed = self._tick
            self._clear(slice(None))

    def _clear(self, slots: Array | slice) -> None:
        """Empties slots."""
        self._low[slots] = self._high[slots] = 0
        self._hard[slots] = self._used[slots] = 0

    def _find(self, identities: Array) -> tuple[Array, Array]:
        """Gives the slots [n] of identities [n, 2], a set's first where one is not in, and found [n] bool."""
        low, high = identities[:, 0], identities[:, 1]
        shift = 65 - self.num_sets.bit_length()
        sets = (
            ((low ^ high) * _MIX >> np.uint64(shift)).astype(np.int64)
            if shift < 64
            else np.zeros(len(low), np.int64)
        )
        slots = (self._sets[sets] == low[:, None]).argmax(axis=1)
        slots += sets * WAYS
        # Where two of a set shared their low word (one pair in 2^64) the second is never found: a miss,
        # nothing worse
        return slots, (self._low[slots] == low) & (self._high[slots] == high)

    def _places(self, slots: Array, there: Array, valid: Array) -> tuple[Array, Array]:
        """Chooses the slots [n] to write to, and says which were chosen [n] bool.

        The r-th newcomer of a set takes its r-th least recently used way; a fifth stays out.
        """
        new = np.flatnonzero(valid & ~there)
        sets = slots[new] // WAYS
        order = np.argsort(sets, kind="stable")
        new, sets = new[order], sets[order]
        rank = ranks_within(sets)
        new, sets, rank = new[rank < WAYS], sets[rank < WAYS], rank[rank < WAYS]
        used = self._used.reshape(-1, WAYS)
        ways = np.argsort(used[sets], axis=1, kind="stable")[np.arange(len(sets)), rank]
        free = used[sets, ways] < self._tick
        new, slots = new[free], slots.copy()
        slots[new] = (sets * WAYS + ways)[free]
        self.counters.evictions += int(np.count_nonzero(self._hard[slots[new]]))
        chosen = there & valid
        chosen[new] = True
        return slots, chosen

    def _count(self, asked: int, hits: int, stale: Array, absent: Array) -> None:
        """Counts the hits and misses of one get."""
        c = self.counters
        c.hits += hits
        c.misses += asked - hits
        c.stale += int(np.count_nonzero(stale))
        c.negative_hits += int(np.count_nonzero(absent))

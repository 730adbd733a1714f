"""L1: rows in this process, in a set-associative table of NumPy arrays. A whole batch is looked up, or put
in, at once.

Bounded in bytes and in age. Four ways a set; within a set the least recently used row goes. Ages are of a
monotonic clock. An invalidation also stops rows that were read before it and come to be put in after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import ranks_within
from ensemble.tiers.settings import TierSettings

WAYS = 4
MISS, FRESH, STALE = 0, 1, 2  # STALE: past its soft TTL, to be used only if nothing newer can be had
# 2^64 / golden ratio: neighbouring item rows go to distant sets (Knuth 6.4)
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class MemoryCounters:
    """Since the start; `bytes` are what the rows that are in now occupy."""

    hits: int = 0
    misses: int = 0
    stale: int = 0
    negative_hits: int = 0
    evictions: int = 0
    invalidations: int = 0


@dataclass(frozen=True)
class Lookup:
    """What L1 knows of n identities. state [n] int8; absent [n] bool: Redis has none (use the snapshot);
    refresh [n] bool: the caller, and nobody else for now, is to ask Redis again; rows [n] packed, garbage
    where state is MISS or absent."""

    state: np.ndarray
    absent: np.ndarray
    refresh: np.ndarray
    rows: np.ndarray
    stamp: int  # give it to put(): what was invalidated since is not put in


class MemoryTier:
    """Identity [2] uint64 -> packed row, or "absent". Identity (0, 0) means empty and must not be asked
    for."""

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
        # identities, word by word
        self._low, self._high = (
            np.zeros(slots, np.uint64),
            np.zeros(slots, np.uint64),
        )
        self._sets = self._low.reshape(self.num_sets, WAYS)
        self._rows = np.zeros(slots, dtype)  # pages that are never written are never allocated
        self._soft, self._hard, self._claim = np.zeros(slots), np.zeros(slots), np.zeros(slots)
        self._used = np.zeros(slots, np.int64)
        self._absent = np.zeros(slots, bool)
        self._invalidated = np.zeros(self.num_sets, np.int64)
        self._tick, self._flushed = 0, 0
        self._lock = threading.Lock()
        self._random = np.random.default_rng(seed)
        self.counters = MemoryCounters()

    @property
    def max_rows(self) -> int:
        return self.num_sets * WAYS

    @property
    def bytes(self) -> int:
        """Of the rows that are in, and of what is kept beside them."""
        return int(np.count_nonzero(self._hard)) * self.slot_bytes

    def get(self, identities: np.ndarray) -> Lookup:
        """Looks n identities [n, 2] up."""
        with self._lock:
            now = self.clock()
            slots, found, stale, absent = self._look(identities, now)
            refresh = stale  # mostly nothing is stale, and then this stays as it is
            if stale.any():
                refresh = stale & (self._claim[slots] <= now)
                self._claim[slots[refresh]] = now + self.refresh_s
            hits = int(np.count_nonzero(found))
            self._used[slots if hits == len(slots) else slots[found]] = self._tick
            self._count(len(slots), hits, stale, absent)
            return Lookup(found.astype(np.int8) + stale, absent, refresh, self._rows.take(slots), self._tick)

    def peek(self, identities: np.ndarray) -> Lookup:
        """As get(), but nothing is counted, used or claimed by it."""
        with self._lock:
            slots, found, stale, absent = self._look(identities, self.clock())
            return Lookup(
                found.astype(np.int8) + stale,
                absent,
                np.zeros(len(slots), bool),
                self._rows.take(slots),
                self._tick,
            )

    def _look(
        self, identities: np.ndarray, now: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """slots [n]; found, stale, absent [n] bool."""
        self._tick += 1
        slots, found = self._find(identities)
        found &= self._hard[slots] > now
        return slots, found, found & (self._soft[slots] <= now), found & self._absent[slots]

    def put(self, identities: np.ndarray, rows: np.ndarray, absent: np.ndarray, stamp: int) -> None:
        """Puts n distinct identities [n, 2] in: their rows [n], or that there is none where absent [n];
        `stamp` is the get's before it."""
        with self._lock:
            if stamp < self._flushed:
                return
            self._tick += 1
            slots, there = self._find(identities)
            valid = self._invalidated[slots // WAYS] <= stamp
            # in their places: no newcomer of this call takes those
            self._used[slots[there & valid]] = self._tick
            slots, chosen = self._places(slots, there, valid)
            slots, rows, absent = slots[chosen], rows[chosen], absent[chosen]
            self._low[slots], self._high[slots] = identities[chosen].T
            self._rows[slots], self._absent[slots] = rows, absent
            self._used[slots] = self._tick
            now, ttl = self.clock(), self.settings
            # only ever shorter: a TTL is a promise
            short = 1 - ttl.jitter * self._random.random((2, len(slots)))
            self._soft[slots] = now + np.where(absent, ttl.negative_ttl_s, ttl.soft_ttl_s) * short[0]
            self._hard[slots] = now + np.where(
                absent, ttl.negative_ttl_s * short[0], ttl.hard_ttl_s * short[1]
            )
            self._claim[slots] = 0

    def drop(self, identities: np.ndarray) -> None:
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

    def _clear(self, slots: np.ndarray | slice) -> None:
        self._low[slots] = self._high[slots] = 0
        self._hard[slots] = self._used[slots] = 0

    def _find(self, identities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, 2] -> slots [n] (the set's first where it is not in), found [n] bool."""
        low, high = identities[:, 0], identities[:, 1]
        shift = 65 - self.num_sets.bit_length()
        sets = (
            ((low ^ high) * _MIX >> np.uint64(shift)).astype(np.int64)
            if shift < 64
            else np.zeros(len(low), np.int64)
        )
        slots = (self._sets[sets] == low[:, None]).argmax(axis=1)
        slots += sets * WAYS
        # where two of a set shared their low word (one pair in 2^64) the second is never found: a miss,
        # nothing worse
        return slots, (self._low[slots] == low) & (self._high[slots] == high)

    def _places(
        self, slots: np.ndarray, there: np.ndarray, valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slots [n] to write to, chosen [n] bool. The r-th newcomer of a set takes its r-th least recently
        used way; a fifth stays out."""
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

    def _count(self, asked: int, hits: int, stale: np.ndarray, absent: np.ndarray) -> None:
        c = self.counters
        c.hits += hits
        c.misses += asked - hits
        c.stale += int(np.count_nonzero(stale))
        c.negative_hits += int(np.count_nonzero(absent))

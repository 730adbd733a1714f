"""Fetches rows from Redis (L2) for all of a batch's misses at once, behind a deadline and a circuit breaker.

It never raises.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from ensemble.arrays import Array
from ensemble.telemetry import Metric
from ensemble.tiers.breaker import Breaker
from ensemble.tiers.connection import Caller, check_installed
from ensemble.tiers.latencies import Latencies
from ensemble.tiers.memory import MemoryTier
from ensemble.tiers.records import RowFormat, identities_from_keys, keys_from_identities, prefix
from ensemble.tiers.settings import TierSettings
from ensemble.tiers.tracking import Tracker

_FIRST_CONNECT_S = 1.0


class Fetched(NamedTuple):
    """Holds what Redis said of n identities.

    rows [n] packed, garbage where not good; good [n] and absent [n] bool, neither where there was no valid
    answer; partial [n] bool: good, but events alone, and the snapshot's row goes before them.
    """

    rows: Array
    good: Array
    absent: Array
    partial: Array


class RedisTier:
    """Is one process's way to Redis, shared by the readers of users and items; one call at a time."""

    def __init__(self, settings: TierSettings, shop: str, release: str) -> None:
        check_installed()
        self.settings = settings
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_open_s)
        self.causes: collections.Counter[str] = collections.Counter()  # why there was no valid answer
        self.rows_asked, self.rows_found, self.bytes_read = 0, 0, 0
        self.latencies = Latencies()
        self._memories: dict[str, MemoryTier] = {}
        self._open_lock, self._call = threading.Lock(), threading.Lock()
        self._caller: Caller | None = None
        self.tracker = Tracker(lambda: self._opened().client, shop, release, self._drop, self._start_over)
        self.tracker.wait_first(_FIRST_CONNECT_S)

    def attach(self, table: str, memory: MemoryTier) -> None:
        """Sends invalidations of `table` to this L1."""
        self._memories[table] = memory

    def close(self) -> None:
        """Ends the thread that follows what changes."""
        self.tracker.close()

    def fetch(self, row_format: RowFormat, identities: Array) -> Fetched | None:
        """Fetches the rows of distinct identities [n, 2]; None if Redis was not asked or did not answer in
        time."""
        version = self.tracker.version
        if version is None:
            self.causes["not_loaded" if self.tracker.connected else "unreachable"] += 1
            return None
        keys = keys_from_identities(prefix(version, row_format.table), identities)
        with self._call:
            if not self.breaker.allow():
                self.causes["breaker_open"] += 1
                return None
            values = self._values(keys)
            if values is None:
                return None
            records, good, causes = row_format.unpack(values, identities)
            if "wrong_id" in causes and not self._is_in_step():
                self._disconnect()  # Replies have slipped: nothing more may be read from this connection.
        self.causes.update(causes)
        self.rows_asked += len(values)
        self.rows_found += int(np.count_nonzero(good))
        self.bytes_read += records.nbytes
        absent = np.array([value is None for value in values], bool)
        return Fetched(records["row"], good, absent, good & (records["partial"] == 1))

    def _values(self, keys: list[bytes]) -> list[Any] | None:
        """Asks for one value a key; None after any failure. Nothing is retried: the snapshot answers
        meanwhile."""
        started = time.perf_counter()
        try:
            values = self._opened().mget(keys)
        except Exception as error:
            # A broken reply can come out of the parser as anything, and no request may fail for it.
            self._fail(_cause(error))
            return None
        finally:
            self.latencies.add(time.perf_counter() - started)
        if not isinstance(values, list) or len(values) != len(keys):
            self._fail("malformed_reply")
            return None
        self.breaker.success()
        return values

    def _is_in_step(self) -> bool:
        """Says whether the connection's next reply is that of its next command."""
        try:
            return self._opened().is_in_step()
        except Exception:  # as in _values
            return False

    def _fail(self, cause: str) -> None:
        """Counts a failed call and ends its connection."""
        self.causes[cause] += 1
        self.breaker.failure()
        self._disconnect()

    def _opened(self) -> Caller:
        """Opens the client when it is first asked for: opening a cluster's asks it for its servers."""
        with self._open_lock:
            if self._caller is None:
                self._caller = Caller(self.settings.url, self.settings.deadline_ms / 1000)
            return self._caller

    def _disconnect(self) -> None:
        """Ends the connection, if there is one."""
        if self._caller is not None:
            self._caller.disconnect()

    def _drop(self, table: str, keys: list[bytes]) -> None:
        """Invalidates rows in the L1 of their table."""
        if table in self._memories:
            self._memories[table].drop(identities_from_keys(keys))

    def _start_over(self) -> None:
        """Empties L1 and lets calls try at once.

        The tracker has just been answered, within the deadline of a call: whoever asks now need not wait for
        an open breaker.
        """
        for memory in list(self._memories.values()):
            memory.flush()
        self.breaker.hurry()

    def metrics(self) -> list[Metric]:
        """Lists Redis's own numbers; those of L1 and the snapshot are the readers'."""
        tier = (("tier", "redis"),)
        out = [
            Metric("peregrine_tier_hits", tier, self.rows_found),
            Metric("peregrine_tier_misses", tier, self.rows_asked - self.rows_found),
            Metric("peregrine_tier_read_bytes", tier, self.bytes_read),
            Metric("peregrine_tier_breaker_opened", tier, self.breaker.opened),
            Metric(
                "peregrine_tier_breaker_closed", tier, float(self.breaker.state == "closed"), is_counter=False
            ),
            Metric("peregrine_tier_tracking", tier, float(self.tracker.connected), is_counter=False),
            *self.latencies.metrics(tier="redis"),
        ]
        return out + [
            Metric("peregrine_tier_failures", (*tier, ("cause", cause)), n)
            for cause, n in sorted(self.causes.items())
        ]


def _cause(error: Exception) -> str:
    """Names the counter that an error goes to: a fixed word, never its text."""
    name = type(error).__name__
    known = {
        "TimeoutError": "timeout",
        "ConnectionError": "connection",
        "AuthenticationError": "auth",
        "NoPermissionError": "auth",
    }
    return known.get(name, "connection" if isinstance(error, OSError) else "error_reply")

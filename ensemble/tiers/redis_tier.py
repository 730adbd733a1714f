"""Fetches rows from Redis (L2) for all of a batch's misses at once, behind a deadline and a circuit breaker.

It never raises.
"""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass
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
# Keys of one MGET: some 200 kB come back. Of a large batch whatever pieces come in time are used
_PIECE = 256


class Fetched(NamedTuple):
    """Holds what Redis said of n identities.

    rows [n] packed, garbage where not good; good [n] and absent [n] bool, neither where there was no valid
    answer; partial [n] bool: good, but events alone, and the snapshot's row goes before them.
    """

    rows: Array
    good: Array
    absent: Array
    partial: Array


@dataclass(frozen=True, eq=False)
class _Asked:
    """Is one MGET: keys of identities [n, 2], and what is to be known when the reply comes late."""

    keys: list[bytes]
    format: RowFormat
    identities: Array
    stamp: int


class _MalformedReplyError(Exception):
    """Says that a reply is none to what was asked."""


def _nothing(one: _Asked) -> Fetched:
    """Makes what stands for rows that Redis has said nothing of."""
    count = len(one.keys)
    return Fetched(np.zeros(count, one.format.row), *(np.zeros(count, bool) for _ in range(3)))


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
        self._caller: Caller[_Asked] | None = None
        self._is_catching_up = False  # replies that were owed came when they were last looked for
        self._is_doubted = False  # somebody else's row came
        self.tracker = Tracker(lambda: self._opened().client, shop, release, self._drop, self._start_over)
        self.tracker.wait_first(_FIRST_CONNECT_S)

    def attach(self, table: str, memory: MemoryTier) -> None:
        """Sends invalidations of `table` to this L1."""
        self._memories[table] = memory

    def close(self) -> None:
        """Ends the thread that follows what changes."""
        self.tracker.close()

    def catch_up(self, ends: float) -> bool:
        """Puts into L1 what earlier calls had asked for and has come since; says whether that was anything.

        It waits for nothing, and reads on until `ends` (monotonic clock) at most.
        """
        with self._call:
            self._is_catching_up = False
            if self._caller is None or not self._caller.owes:
                return False
            try:
                for one, values in self._caller.replies(0.0):
                    self._keep(one, values)
                    self._is_catching_up = True
                    if time.monotonic() > ends:
                        break
                self._drop_if_slipped()
            except Exception as error:  # as in _read
                self._fail(_cause(error))
            return self._is_catching_up

    def fetch(self, row_format: RowFormat, identities: Array, stamp: int, ends: float) -> Fetched | None:
        """Fetches the rows of distinct identities [n, 2] until `ends`, of the monotonic clock.

        What comes later goes to L1 (catch_up), unless it was invalidated since the get with `stamp`. None if
        Redis was not asked, or has said nothing in time.
        """
        version = self.tracker.version
        if version is None:
            self.causes["not_loaded" if self.tracker.connected else "unreachable"] += 1
            return None
        keys = keys_from_identities(prefix(version, row_format.table), identities)
        asked = [
            _Asked(keys[at : at + _PIECE], row_format, identities[at : at + _PIECE], stamp)
            for at in range(0, len(keys), _PIECE)
        ]
        with self._call:
            if not self.breaker.allow():
                self.causes["breaker_open"] += 1
                return None
            started = time.perf_counter()
            answers = self._read(asked, ends)
            self.latencies.add(time.perf_counter() - started)
        if not answers:
            return None
        parts = [answers.get(id(one)) or _nothing(one) for one in asked]
        return Fetched(*(np.concatenate(of) if len(of) > 1 else of[0] for of in zip(*parts, strict=True)))

    def _read(self, asked: list[_Asked], ends: float) -> dict[int, Fetched]:
        """Asks, and gives the answers that come until `ends`, by the id() of what was asked.

        Nothing is retried. While earlier replies are owed nothing is asked or waited for: whoever asked them
        has waited, and a Redis that is behind catches up no sooner by being asked more.
        """
        answers = dict[int, Fetched]()
        try:
            caller = self._opened()
            if not caller.owes:
                caller.ask(asked)
                for one, values in caller.replies(ends):
                    answers[id(one)] = self._answer(one, values)
                if self._drop_if_slipped():  # rows bear whose they are, "there is none" does not
                    answers = {
                        key: of._replace(absent=np.zeros_like(of.absent)) for key, of in answers.items()
                    }
            elif self._is_catching_up:  # neither well nor ill: more of it comes until the next call
                if self.breaker.state == "half_open":
                    self.breaker.success()
                return answers
        except Exception as error:
            # A broken reply can come out of the parser as anything, and no request may fail for it.
            self._fail(_cause(error))
            return answers
        if len(answers) < len(asked):
            self.causes["timeout"] += 1
        if answers:
            self.breaker.success()
        else:
            self.breaker.failure()
        return answers

    def _keep(self, one: _Asked, values: Any) -> None:
        """Puts a late reply into L1; rows of events alone would need the snapshot's, and are asked again."""
        found = self._answer(one, values)
        whole = found.good & ~found.partial
        if not self._is_doubted:
            whole |= found.absent
        self._memories[one.format.table].put(
            one.identities[whole], found.rows[whole], found.absent[whole], one.stamp
        )

    def _answer(self, one: _Asked, values: Any) -> Fetched:
        """Reads a reply; _MalformedReplyError if it is none to the question."""
        if not isinstance(values, list) or len(values) != len(one.keys):
            raise _MalformedReplyError
        records, good, causes = one.format.unpack(values, one.identities)
        self._is_doubted |= "wrong_id" in causes
        self.causes.update(causes)
        self.rows_asked += len(values)
        self.rows_found += int(np.count_nonzero(good))
        self.bytes_read += records.nbytes
        absent = np.array([value is None for value in values], bool)
        return Fetched(records["row"], good, absent, good & (records["partial"] == 1))

    def _drop_if_slipped(self) -> bool:
        """Ends the connection where somebody else's row came because replies have slipped, and says so; the
        row may as well have been stored so, which is no reason."""
        doubted, self._is_doubted = self._is_doubted, False
        if not doubted or self._is_in_step():
            return False
        self._disconnect()
        return True

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

    def _opened(self) -> Caller[_Asked]:
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
        "_MalformedReplyError": "malformed_reply",
        "TimeoutError": "timeout",
        "ConnectionError": "connection",
        "AuthenticationError": "auth",
        "NoPermissionError": "auth",
    }
    return known.get(name, "connection" if isinstance(error, OSError) else "error_reply")

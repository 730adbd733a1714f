"""Writes what happened just now into the feature rows in Redis, so that the next `recommend` knows it.

    from clients import EventWriter

    with EventWriter("redis://writer:…@127.0.0.1:6379", shop="beauty") as events:
        events.record_event("u42", "lipstick-7", "click", time.time())

A user's past stays bounded, holds an item once, and is in order of event time: events may come late, twice,
or from several writers at once. Every release of the shop whose rows are loaded is kept up to date. Servers
drop their cached row at once.
"""

from __future__ import annotations

import json
import random
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clients.event_checks import Event, Id, ItemUpdate, check_event, packed_update
from ensemble.arrays import Array
from ensemble.errors import InvalidArgument, ReleaseError, ServerError
from ensemble.id_rule import recorded_id
from ensemble.release.names import release_names
from ensemble.release.release import open_release
from ensemble.schema import MAX_KINDS, Schema, kind_of, schema_from_json
from ensemble.tiers import records as rows
from ensemble.tiers.connection import connect_now, reason
from ensemble.tiers.past import merge_past
from ensemble.time_rule import check_time

if TYPE_CHECKING:
    from ensemble.live.items import LiveItems

_ATTEMPTS = 50  # of one row, when other writers change it meanwhile
_REMEMBERED = 1_000_000  # item ids a release


@dataclass(frozen=True)
class Outcome:
    """Says what came of some events, summed over the shop's releases."""

    changed: int = 0  # rows written
    unchanged: int = 0  # rows that knew it all
    unknown_items: tuple[str, ...] = ()  # no release knows them: nothing to put into a past
    left_out: tuple[str, ...] = ()  # names of events that enter no past by the shop's `history`

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.changed + other.changed,
            self.unchanged + other.unchanged,
            (*self.unknown_items, *other.unknown_items),
            tuple(dict.fromkeys((*self.left_out, *other.left_out))),
        )


@dataclass
class _Target:
    """Holds what is needed to write rows of one loaded version of a release."""

    version: bytes
    ttl_s: int
    users: rows.RowFormat
    items: rows.RowFormat
    live: LiveItems | None  # names items that were added while they are served
    item_rows: dict[bytes, int]


class EventWriter:
    """Writes events of one shop. Needs a Redis user who may write; not to be shared between threads."""

    def __init__(
        self,
        url: str,
        shop: str,
        *,
        only: Sequence[str] | Literal["all"] | None = None,
        repository: Path | None = None,
        home: Path | None = None,
    ) -> None:
        """Connects to Redis; ServerError if it does not answer.

        only        names of the events that enter a past, or "all"; by default those of the release's own
                    pasts, as interactions.history of shop.toml has them
        repository  where items are looked up that were added live (`peregrine items add`); without it, events
                    that name them change nothing and come back as unknown
        home        the folder of their log; the repository if not given
        """
        if isinstance(only, str) and only != "all":  # a sequence of letters
            raise InvalidArgument(f"only: must be a list of names of events, got {only!r}")
        self._client, self._repository, self._home = connect_now(url), repository, home
        self._shop, self._by_rule = shop, only is None
        self._only = None if only is None or only == "all" else frozenset(only)
        self._targets: dict[bytes, _Target] = {}

    def record_event(self, user_id: Id, item_id: Id, event: str, time: float | str) -> Outcome:
        """Writes one event; returns when Redis has it."""
        return self.record_events([Event(user_id, item_id, event, time)])

    def record_events(self, events: Sequence[Event]) -> Outcome:
        """Writes many events, each user's row once; InvalidArgument names what is wrong with one before any
        is written."""
        checked = [check_event(event) for event in events]
        wanted = [
            one
            for one, event in zip(checked, events, strict=True)
            if self._only is None or event.event in self._only
        ]
        return self._guarded(lambda: self._record(wanted)) if wanted else Outcome()

    def update_item(self, update: ItemUpdate) -> Outcome:
        """Replaces parts of an item's row. For each number the latest `time` wins, so that late and repeated
        updates do no harm."""
        item_id, time = recorded_id("item_id", update.item_id), check_time(update.time)[0]
        return self._guarded(lambda: self._update(item_id, time, update))

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guarded(self, write: Callable[[], Outcome]) -> Outcome:
        """Runs `write`; what goes wrong with Redis becomes a ServerError."""
        import redis

        try:
            return write()
        except (redis.exceptions.RedisError, OSError) as error:
            raise ServerError(
                f"Redis: {reason(error)}; nothing is lost by sending the same events again"
            ) from None

    def _record(self, events: Sequence[tuple[bytes, bytes, str, float]]) -> Outcome:
        """Puts events (user id, item id, name, time) into their users' pasts, in every loaded release."""
        outcome, known, entered = Outcome(), set[bytes](), set[str]()
        for target in self._current_targets():
            names = _of_a_past(target.users.schema) if self._by_rule else None
            entered |= {name for _, _, name, _ in events if names is None or name in names}
            item_rows = self._item_rows(target, [item for _, item, _, _ in events])
            by_user: dict[bytes, list[tuple[int, int, float]]] = {}
            for user, item, name, time in events:
                if item in item_rows and (names is None or name in names):
                    kind = kind_of(target.users.schema, name)
                    by_user.setdefault(user, []).append((item_rows[item], kind, time))
            known |= set(item_rows)
            for user, past in by_user.items():
                outcome += self._write_user(target, user, past)
        unknown = tuple(dict.fromkeys(item.decode() for _, item, _, _ in events if item not in known))
        others = tuple(dict.fromkeys(name for _, _, name, _ in events if name not in entered))
        return outcome + Outcome(unknown_items=unknown, left_out=others)

    def _write_user(self, target: _Target, user: bytes, past: Sequence[tuple[int, int, float]]) -> Outcome:
        """Merges new events (item row, kind, time) into one user's past."""
        new_rows, new_kinds, new_times = (np.array(column) for column in zip(*past, strict=True))
        identity = rows.user_identities(np.array([user]))

        def change(value: bytes | None) -> bytes | None:
            row, times, partial = _opened(target.users, identity, value)
            before = row.tobytes()
            merged = merge_past(row[0], times, new_rows, new_kinds, new_times)
            if row.tobytes() == before and np.array_equal(merged, times):
                return None
            return target.users.pack(identity, row, clock.time(), partial).tobytes() + merged.tobytes()

        return self._change(
            rows.keys_from_identities(rows.prefix(target.version, "users"), identity)[0], target.ttl_s, change
        )

    def _update(self, item_id: bytes, time: float, update: ItemUpdate) -> Outcome:
        """Writes an item's update into every loaded release that knows the item."""
        outcome, known = Outcome(), False
        for target in self._current_targets():
            row = self._item_rows(target, [item_id]).get(item_id)
            if row is not None:
                known = True
                outcome += self._write_item(target, row, time, update)
        return outcome if known else Outcome(unknown_items=(item_id.decode(),))

    def _write_item(self, target: _Target, item_row: int, time: float, update: ItemUpdate) -> Outcome:
        """Writes an update into an item's row; changes nothing if Redis has lost the row, since an update
        alone makes no item."""
        identity = rows.item_identities(np.array([item_row]))
        new, named = packed_update(target.items, update)

        def change(value: bytes | None) -> bytes | None:
            row, times, partial = _opened(target.items, identity, value)
            if partial:
                return None
            words = row.view(np.uint32)
            # Of two updates with one time the larger word wins, whichever comes first.
            newer = named & ((times < time) | ((times == time) & (words < new.view(np.uint32))))
            if not newer.any():
                return None
            words[newer], times[newer] = new.view(np.uint32)[newer], time
            return target.items.pack(identity, row, clock.time()).tobytes() + times.tobytes()

        return self._change(
            rows.keys_from_identities(rows.prefix(target.version, "items"), identity)[0], target.ttl_s, change
        )

    def _change(self, key: bytes, ttl_s: int, change: Callable[[bytes | None], bytes | None]) -> Outcome:
        """Reads, changes and writes one key, again if another writer was faster."""
        from redis.exceptions import WatchError

        with self._client.pipeline(transaction=True) as pipe:
            for attempt in range(_ATTEMPTS):
                try:
                    pipe.watch(key)
                    value = change(_value(pipe, key))
                    if value is None:
                        return Outcome(unchanged=1)
                    pipe.multi()
                    pipe.set(key, value, ex=ttl_s)
                    pipe.execute()
                    return Outcome(changed=1)
                except WatchError:
                    clock.sleep(random.uniform(0, 0.001 * min(attempt + 1, 10)))
        raise ServerError(
            f"a row was changed by others {_ATTEMPTS} times while it was written; send the same events again"
        )

    def _current_targets(self) -> list[_Target]:
        """Gives the shop's loaded versions as they are now; ServerError if there are none."""
        pointers: dict[bytes, bytes] = self._client.hgetall(rows.shop_key(self._shop))
        for name, version in pointers.items():
            text = None if version in self._targets else self._client.get(rows.meta_key(version))
            if text is not None:  # else its rows have expired
                meta = json.loads(text)
                live = _live_items(self._repository, name.decode(), meta["digest"], self._home)
                self._targets[version] = _target(version, meta, live)
        self._targets = {
            version: self._targets[version] for version in pointers.values() if version in self._targets
        }
        if not self._targets:
            raise ServerError(f"Redis has no rows of shop {self._shop!r}; load them: peregrine features load")
        return list(self._targets.values())

    def _item_rows(self, target: _Target, item_ids: Sequence[bytes]) -> dict[bytes, int]:
        """Gives {id: row} of the items that the release knows; those met before are remembered."""
        missing = [item for item in dict.fromkeys(item_ids) if item not in target.item_rows]
        if missing:
            if len(target.item_rows) > _REMEMBERED:
                target.item_rows.clear()
            target.item_rows.update(self._looked_up(target, missing))
        return {item: target.item_rows[item] for item in item_ids if item in target.item_rows}

    def _looked_up(self, target: _Target, item_ids: Sequence[bytes]) -> dict[bytes, int]:
        """Asks Redis for the items' rows, and the live log for those that Redis does not have."""
        with self._client.pipeline(transaction=False) as pipe:
            for item in item_ids:
                pipe.get(rows.name_key(target.version, item))
            values = dict(zip(item_ids, pipe.execute(), strict=True))
        item_rows = {item: int(value) for item, value in values.items() if value is not None}
        added = [item for item, value in values.items() if value is None]
        if added and target.live is not None:
            live_rows = target.live.refresh().rows_from_ids(np.array(added)).tolist()
            item_rows |= {item: row for item, row in zip(added, live_rows, strict=True) if row > 0}
        return item_rows


def _target(version: bytes, meta: Mapping[str, Any], live: LiveItems | None) -> _Target:
    """Reads from a loaded version's `meta` what is needed to write its rows."""
    schema = schema_from_json(json.dumps(meta["schema"]))
    users, items = (rows.RowFormat(table, schema, meta["digest"], meta["num_items"]) for table in rows.TABLES)
    return _Target(version, meta["ttl_s"], users, items, live, {})


def _of_a_past(schema: Schema) -> tuple[str, ...] | None:
    """Gives the names of the events that a release's pasts are of; None where any may be: the shop has no
    names but those of its tasks, or more of them than a release tells apart."""
    named = set(schema.events) - set(Schema.events) - {task.name for task in schema.tasks}
    has_none = not named and schema.events[:1] == Schema.events
    return None if has_none or len(schema.events) >= MAX_KINDS else schema.events


def _live_items(
    repository: Path | None, name: str, digest: int, home: Path | None = None
) -> LiveItems | None:
    """Opens the live items of a release; None unless the repository has the very release that was loaded, and
    this Peregrine reads it."""
    if repository is None or name not in release_names(repository):
        return None
    try:
        release = open_release(repository, name, home)
    except ReleaseError:  # an old one whose rows have not expired yet: the other releases get the events
        return None
    from ensemble.live.items import LiveItems

    return LiveItems(release) if rows.release_digest(release) == digest else None


def _value(client: Any, key: bytes) -> bytes | None:
    """Gets the value of a key; None as well where no string stands under it, for that is to be replaced."""
    from redis.exceptions import ResponseError

    try:
        value: bytes | None = client.get(key)
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        return None
    return value


def _opened(row_format: rows.RowFormat, identity: Array, value: bytes | None) -> tuple[Array, Array, bool]:
    """Reads a stored value: its row [1], its times, and whether it lacks the loaded row (there was none, or
    none that is valid)."""
    if value is not None:
        records, good, _ = row_format.unpack([value], identity)
        if good[0]:
            return records["row"].copy(), row_format.tail(value), bool(records["partial"][0])
    empty = np.zeros(1, row_format.row)
    if row_format.table == "users":
        empty["seen"] = -1
    return empty, np.full(row_format.times, -np.inf), True

"""Loads a release's snapshot rows into Redis, under keys of a new version; then one pointer turns readers to
them."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.errors import InvalidInput, ServerError
from ensemble.release.release import Release
from ensemble.tiers.connection import connect_now, reason
from ensemble.tiers.records import (
    item_identities,
    keys_from_identities,
    meta_key,
    name_key,
    prefix,
    row_format,
    shop_key,
    user_identities,
)

_PIECE = 2000  # rows a pipeline: some 2 MB under way
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Loaded:
    """Says what a load did."""

    shop: str
    release: str
    version: str
    previous: str | None  # the version that readers turned away from
    users: int
    items: int
    seconds: float
    expiring: int  # keys of the previous version, which go after keep_s


def load_release(
    release: Release,
    url: str,
    progress: Progress = lambda text, share: None,
    *,
    ttl_days: float = 30.0,
    keep_s: int = 600,
) -> Loaded:
    """Loads every row, switches readers over at once, lets the previous version's rows expire after keep_s.

    Every key has a TTL, so that a load which is killed leaves nothing for ever, and an eviction policy of
    volatile-* spares only the pointers. Rows that a writer updates live ttl_days again.
    """
    import redis

    if not 0 < ttl_days < 36500 or not 0 < keep_s < 1 << 30:
        raise InvalidInput(
            f"--ttl-days must be above 0 and below 36500, and keep_s above 0, got {ttl_days:g}, {keep_s}"
        )
    release.verify_data("user_ids.npy", "users.npy", "item_ids.npy", "items.npy")
    client, started = connect_now(url, 30.0), time.monotonic()
    version, ttl_s = secrets.token_hex(6).encode(), max(1, int(ttl_days * 86400))
    try:
        client.set(meta_key(version), _meta(release, ttl_s), ex=ttl_s)
        _set_all(client, release, version, ttl_s, progress)
        previous = client.hget(shop_key(release.schema.shop), release.name)
        # From here on readers ask for the new rows
        client.hset(shop_key(release.schema.shop), release.name, version)
        expiring = _expire(client, previous, keep_s) if previous else 0
    except (redis.exceptions.RedisError, OSError) as error:
        raise ServerError(
            f"Redis: {reason(error)}; the load stopped, readers stay with the version they had",
            "load again when it is cured",
        ) from None
    return Loaded(
        release.schema.shop,
        release.name,
        version.decode(),
        previous.decode() if previous else None,
        len(release.user_ids),
        len(release.item_ids),
        round(time.monotonic() - started, 3),
        expiring,
    )


def _set_all(client: Any, release: Release, version: bytes, ttl_s: int, progress: Progress) -> None:
    """Sets every row of users and items, and every item id's row number, under keys of `version`."""
    total, done = len(release.user_ids) + 2 * len(release.item_ids), 0
    sources = (_rows(release, "users", version), _rows(release, "items", version), _names(release, version))
    for piece in itertools.chain.from_iterable(sources):
        _set(client, piece, ttl_s)
        done += len(piece)
        progress(f"{done:,} of {total:,} rows", done / max(total, 1))


def _meta(release: Release, ttl_s: int) -> str:
    """Writes, as JSON, what a writer must know that has no release folder."""
    digest, schema = row_format(release, "users").digest, json.loads(release.schema.to_json())
    return json.dumps(
        {
            "release": release.name,
            "digest": digest,
            "num_items": len(release.item_ids),
            "ttl_s": ttl_s,
            "schema": schema,
        }
    )


def _rows(release: Release, table: str, version: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    """Gives (key, record) of every row but the unknown one, in pieces."""
    fmt, start = row_format(release, table), prefix(version, table)
    ids = release.user_ids if table == "users" else release.item_ids
    source = release.users if table == "users" else release.items
    for first in range(1, len(ids) + 1, _PIECE):
        rows = np.arange(first, min(first + _PIECE, len(ids) + 1))
        identities = user_identities(ids.ids_from_rows(rows)) if table == "users" else item_identities(rows)
        raw, width = fmt.pack(identities, source[rows], time.time()).tobytes(), fmt.record.itemsize
        records = [raw[at : at + width] for at in range(0, len(raw), width)]
        yield list(zip(keys_from_identities(start, identities), records, strict=True))


def _names(release: Release, version: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
    """Gives (key, row number) of every item id, in pieces."""
    for first in range(1, len(release.item_ids) + 1, _PIECE):
        rows = np.arange(first, min(first + _PIECE, len(release.item_ids) + 1))
        yield [
            (name_key(version, name), b"%d" % row)
            for name, row in zip(release.item_ids.ids_from_rows(rows).tolist(), rows.tolist(), strict=True)
        ]


def _set(client: Any, pairs: list[tuple[bytes, bytes]], ttl_s: int) -> None:
    """Sets keys with a TTL, in one pipeline."""
    with client.pipeline(transaction=False) as pipe:
        for key, value in pairs:
            pipe.set(key, value, ex=ttl_s)
        pipe.execute()


def _expire(client: Any, version: bytes, keep_s: int) -> int:
    """Lets a version's keys expire in keep_s, when no request asks for them any more; gives their number."""
    count = 0
    with client.pipeline(transaction=False) as pipe:
        for key in client.scan_iter(match=b"feat:%s:*" % version, count=_PIECE):
            pipe.expire(key, keep_s)
            if len(pipe) >= _PIECE:
                count += len(pipe.execute())
        return count + len(pipe.execute())

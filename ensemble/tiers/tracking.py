"""Drops rows from L1 as soon as Redis says that they changed, on a connection and thread of their own.

BCAST mode: Redis keeps no table of who read what, it tells every change under our prefixes. The same
connection follows the pointer to the version that is served. A connection that was lost may have missed
messages: after it comes back, L1 starts empty.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from ensemble.tiers import records as rows

_QUIET_S = 1.0  # without a message: is the connection still there?
_ANSWER_S = 1.0


class Tracker:
    """Follows one shop's pointer and the rows of the version it points to."""

    def __init__(
        self,
        client: Callable[[], Any],
        shop: str,
        release: str,
        on_keys: Callable[[str, list[bytes]], None],
        on_flush: Callable[[], None],
    ) -> None:
        """Starts the thread: `client` gives the tier's client.

        on_keys(table, keys) and on_flush() are called on the tracker's thread.
        """
        self._client, self._shop, self._release = client, shop, release
        self._on_keys, self._on_flush = on_keys, on_flush
        # Stays when the connection is lost: TTLs bound what may then be stale
        self.version: bytes | None = None
        self.connected, self.connects, self.failures = False, 0, 0
        self._first, self._stop = threading.Event(), threading.Event()
        self._again, self._moved = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="redis-tracking", daemon=True)
        self._thread.start()

    def wait_first(self, timeout_s: float) -> None:
        """Returns when the first attempt to connect is over, whatever came of it."""
        self._first.wait(timeout_s)

    def close(self) -> None:
        """Lets the thread end; it is not waited for."""
        self._stop.set()
        self._again.set()

    def _run(self) -> None:
        """Follows, and connects again after a pause, until close()."""
        while not self._stop.is_set():
            try:
                self._follow()
            except Exception:  # whatever a broken server says: try again
                self.failures += 1
            self.connected = False
            self._first.set()
            if not self._moved:
                self._stop.wait(random.uniform(0.05, 0.15))
            self._moved = False

    def _follow(self) -> None:
        """Turns tracking on, reads the pointer, listens until a connection is lost or the pointer moves."""
        client = self._client()
        self._again.clear()
        connections = [_connect(pool) for pool in _pools(client)]
        try:
            for connection in connections:
                _ask(connection, "CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", rows.shop_key(self._shop))
            version = client.hget(rows.shop_key(self._shop), self._release)
            prefixes = {table: rows.prefix(version, table) for table in rows.TABLES} if version else {}
            for connection in connections if prefixes else ():
                _ask(
                    connection,
                    "CLIENT",
                    "TRACKING",
                    "ON",
                    "BCAST",
                    *[part for p in prefixes.values() for part in ("PREFIX", p)],
                )
            self.version = version
            self._on_flush()
            self.connected, self.connects = True, self.connects + 1
            self._first.set()
            others = [
                threading.Thread(target=self._listen, args=(c, prefixes), daemon=True)
                for c in connections[1:]
            ]
            for thread in others:
                thread.start()
            self._listen(connections[0], prefixes)
            for thread in others:
                thread.join(2 * (_QUIET_S + _ANSWER_S))
        finally:
            for connection in connections:
                connection.disconnect()

    def _listen(self, connection: Any, prefixes: dict[str, bytes]) -> None:
        """Listens until the connection is lost, the pointer moves, or another server's listener ends."""
        try:
            while not self._again.is_set():
                message = _read(connection, _QUIET_S)
                if message is None:
                    connection.send_command("PING")
                    message = _read(connection, _ANSWER_S)
                    if message is None:
                        return
                if _is_push(message):
                    self._hear(message[1], prefixes)
        except Exception:  # as in _run
            self.failures += 1
        finally:
            self._again.set()

    def _hear(self, keys: list[bytes] | None, prefixes: dict[str, bytes]) -> None:
        """Passes on which rows changed; `keys` None: all of them. Notes when the pointer moved."""
        if keys is None:  # FLUSHALL
            self._on_flush()
            self._again.set()
            return
        for table, start in prefixes.items():
            mine = [key for key in keys if key.startswith(start)]
            if mine:
                self._on_keys(table, mine)
        if (
            rows.shop_key(self._shop) in keys
            and self._client().hget(rows.shop_key(self._shop), self._release) != self.version
        ):
            self._moved = True
            self._again.set()


def _pools(client: Any) -> list[Any]:
    """Gives the connection pool of each server that holds keys."""
    if hasattr(client, "get_primaries"):
        return [client.get_redis_connection(node).connection_pool for node in client.get_primaries()]
    return [client.connection_pool]


def _connect(pool: Any) -> Any:
    """Opens a connection with the pool's address and login, speaking RESP3, whose reads may wait."""
    from redis.maint_notifications import MaintNotificationsConfig

    keep = {
        k: v
        for k, v in pool.connection_kwargs.items()
        if k not in ("parser_class", "protocol", "socket_timeout", "maint_notifications_config")
    }
    connection = pool.connection_class(
        **keep,
        protocol=3,
        socket_timeout=_ANSWER_S,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    connection.connect()
    # As redis-py's own cache does; without it they are lost
    connection._get_parser().set_invalidation_push_handler(lambda message: message)
    return connection


def _ask(connection: Any, *command: Any) -> None:
    """Sends a command and waits for its reply; messages before it are left out."""
    connection.send_command(*command)
    while True:
        reply = connection.read_response(push_request=True)
        if not _is_push(reply):
            return


def _read(connection: Any, timeout_s: float) -> Any:
    """Gives the next message, or None after timeout_s without one."""
    from redis.exceptions import TimeoutError as RedisTimeout

    try:
        return connection.read_response(timeout=timeout_s, push_request=True, disconnect_on_error=False)
    except RedisTimeout:
        return None


def _is_push(message: Any) -> bool:
    """Says whether a message is an invalidation."""
    return isinstance(message, list) and len(message) == 2 and message[0] == b"invalidate"

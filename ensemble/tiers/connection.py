"""Reaches Redis: a deadline for every whole call, no retries, a cluster or one server behind the same calls.

redis-py is imported late.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from ensemble.errors import InvalidInput, ServerError
from ensemble.tiers.settings import hidden

_CLUSTER = "+cluster://"


def is_cluster(url: str) -> bool:
    """Says whether the URL names a cluster."""
    return _CLUSTER in url


def open_client(url: str, timeout_s: float, *, whole_call: bool = True) -> Any:
    """Opens redis.Redis or redis.cluster.RedisCluster; no call outlives timeout_s.

    redis-py's own defaults wait up to 59 s for a silent server. whole_call: the limit holds even if a reply
    drips in. Otherwise each read gets that long, and a lost connection is tried again thrice, which writers
    want: what they write may be written twice.
    """
    redis = _redis()
    retry = (
        redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        if whole_call
        else redis.retry.Retry(redis.backoff.ExponentialBackoff(0.5, 0.05), 3)
    )
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": retry,
        "protocol": 2,  # RESP3 brings nothing to GETs but a longer handshake
        "health_check_interval": 0,
        "driver_info": None,  # no CLIENT SETINFO: one call less to connect
    }
    try:
        if is_cluster(url):
            return redis.cluster.RedisCluster.from_url(url.replace(_CLUSTER, "://"), **options)
        if whole_call:
            options["parser_class"] = _deadline_parser(redis)
        return redis.Redis.from_url(url, **options)
    except ValueError as error:
        raise InvalidInput(f"--redis: {hidden(url)!r}: {error}") from None


def connect_now(url: str, timeout_s: float = 5.0) -> Any:
    """Opens a client for commands; ServerError at once if Redis cannot be reached or refuses us.

    Long reads are allowed.
    """
    redis = _redis()
    try:
        client = open_client(url, timeout_s, whole_call=False)
        client.ping()
        return client
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
        raise ServerError(
            f"Redis at {hidden(url)} does not answer: {reason(error)}", "start it, or correct --redis"
        ) from None


def reason(error: BaseException) -> str:
    """Gives an error's text as one line, without keys or values."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:160]


def check_installed() -> None:
    """Raises ModuleNotFoundError unless redis-py and hiredis are there: better at the start than at each
    call."""
    import hiredis
    import redis

    assert redis
    assert hiredis


_LAST_LOOK_S = 0.0005


class Caller:
    """Sends MGETs, on one server over a connection of its own.

    redis-py's pool and command layers cost as much as the rest of the call.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.client = open_client(url, timeout_s)
        self._connection: Any = None if is_cluster(url) else self.client.connection_pool.make_connection()

    def mget(self, keys: list[bytes]) -> Any:
        """Asks for all of a batch's keys in one round trip (a cluster: one for each of its servers)."""
        import hiredis

        if self._connection is None:
            return self.client.mget_nonatomic(keys)
        if self._connection.is_connected:
            self._drop_if_unfit()
        command: tuple[Any, ...] = ("MGET", *keys)
        self._connection.send_packed_command([hiredis.pack_command(command)])
        return self._connection.read_response()

    def is_in_step(self) -> bool:
        """Says whether the next reply is that of the next command; False for a cluster, which has many
        connections.

        Somebody else's row may also be what is stored: no reason to connect anew at each request that reads
        it.
        """
        import hiredis

        if self._connection is None:
            return False
        nonce = secrets.token_hex(8)
        command: tuple[Any, ...] = ("PING", nonce)
        self._connection.send_packed_command([hiredis.pack_command(command)])
        return bool(self._connection.read_response() == nonce.encode())

    def _drop_if_unfit(self) -> None:
        """Ends a connection that Redis has ended, or that holds an answer to nothing we asked.

        That is better known now than by a failed call.
        """
        try:
            unread = self._connection.can_read(0)
        except Exception:
            unread = True
        if unread:
            self._connection.disconnect()

    def disconnect(self) -> None:
        """Ends all connections: what comes next is read from new ones."""
        if self._connection is not None:
            self._connection.disconnect()
            return
        for node in self.client.get_nodes():
            node.redis_connection.connection_pool.disconnect()


def _redis() -> Any:
    """Imports redis-py with the parts that we use."""
    import redis.backoff
    import redis.cluster
    import redis.retry

    return redis


def _deadline_parser(redis: Any) -> type:
    """Makes a parser whose whole reply must come within the time-out.

    redis-py's own gives every read of the socket the whole time-out; a reply that drips in would take any
    number of them.
    """

    class DeadlineParser(redis.connection.DefaultParser):  # type: ignore[misc, name-defined]
        def read_response(self, *args: Any, **options: Any) -> Any:
            self.ends, self.looked_again = time.monotonic() + self._socket_timeout, False
            return super().read_response(*args, **options)

        def read_from_socket(self, *args: Any, **options: Any) -> Any:
            left_s = self.ends - time.monotonic()
            if left_s <= 0 and not self.looked_again:  # we may not have run, and the reply may be there
                self.looked_again, left_s = True, _LAST_LOOK_S
            if left_s <= 0:
                raise redis.exceptions.TimeoutError("the reply took longer than the deadline")
            return super().read_from_socket(timeout=left_s)

    return DeadlineParser

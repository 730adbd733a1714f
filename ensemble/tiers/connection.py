"""Reaches Redis: a deadline for every whole call, no retries, a cluster or one server behind the same calls.

redis-py is imported late.
"""

from __future__ import annotations

import collections
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from ensemble.errors import InvalidInput, ServerError
from ensemble.tiers.settings import hidden

_CLUSTER = "+cluster://"


class Question(Protocol):
    """Is what Redis is asked in one MGET, with whatever its asker has to know when the reply comes."""

    @property
    def keys(self) -> list[bytes]:
        """Gives the keys."""
        ...


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


Asked = TypeVar("Asked", bound=Question)
_MOST_OWED = 128  # questions whose replies have not come; more are not asked


class Caller(Generic[Asked]):
    """Sends MGETs, on one server over a connection of its own.

    redis-py's pool and command layers cost as much as the rest of the call. A reply that does not come in
    time is owed: a later call reads it before its own, so that nothing which Redis has sent is lost.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.client = open_client(url, timeout_s)
        self._connection: Any = None if is_cluster(url) else self.client.connection_pool.make_connection()
        self._owed: collections.deque[Asked] = collections.deque()

    @property
    def owes(self) -> bool:
        """Says whether replies are still to come."""
        return bool(self._owed)

    def ask(self, questions: Sequence[Asked]) -> None:
        """Sends a MGET for each question, in one piece; their replies are owed then."""
        import hiredis

        if len(self._owed) + len(questions) > _MOST_OWED:
            raise TimeoutError("too many replies are owed")
        if self._connection is not None:
            if self._connection.is_connected and not self._owed:
                self._drop_if_unfit()
            commands: list[tuple[Any, ...]] = [("MGET", *question.keys) for question in questions]
            self._connection.send_packed_command([b"".join(map(hiredis.pack_command, commands))])
        self._owed.extend(questions)

    def replies(self, ends: float) -> Iterator[tuple[Asked, Any]]:
        """Gives the replies that come until `ends` (monotonic clock), each with its question, oldest first.
        A cluster's come in as many round trips as it has servers."""
        from redis.exceptions import TimeoutError as RedisTimeout

        while self._owed:
            if self._connection is None:
                yield self._owed[0], self.client.mget_nonatomic(self._owed.popleft().keys)
                continue
            parser = self._connection._get_parser()
            parser.ends = ends
            try:
                reply = self._connection.read_response(disconnect_on_error=False)
            except RedisTimeout:
                return
            finally:
                parser.ends = None
            yield self._owed.popleft(), reply

    def is_in_step(self) -> bool:
        """Says whether the next reply is that of the next command; False for a cluster, which has many
        connections.

        Somebody else's row may also be what is stored: no reason to connect anew at each request that reads
        it.
        """
        import hiredis

        if self._connection is None or self._owed:
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
        """Ends all connections: what comes next is read from new ones, and what was owed never comes."""
        self._owed.clear()
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
        ends: float | None = None  # of a call of several replies, by the monotonic clock

        def read_response(self, *args: Any, **options: Any) -> Any:
            self._until = time.monotonic() + self._socket_timeout if self.ends is None else self.ends
            return super().read_response(*args, **options)

        def read_from_socket(self, *args: Any, **options: Any) -> Any:
            # What has come by now is read however late it is: on a busy machine it may be us who are late.
            left_s = max(0.0, self._until - time.monotonic())
            return super().read_from_socket(timeout=left_s)

    return DeadlineParser

"""Asks a served release for ranked lists: Client(url).recommend(user) gives Recommendations.

clients.aio.AsyncClient does the same for asyncio, with the same arguments.

    from clients import Client

    with Client("127.0.0.1:8001") as client:
        for item in client.recommend("u42", top_k=5, session_items=["lipstick-7"]).items:
            print(item.item_id, item.score, item.probabilities)

The options are those of ensemble.options.RequestOptions, all optional; one of recommend_many is shared by its
users, or a list with one value each. Wherever a list is taken, a numpy array is too. `budget_ms` says for how
many milliseconds to wait for the answer; BudgetExceeded is raised after that.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Unpack

from clients.errors import BudgetExceeded, CallError
from clients.results import Recommendations
from clients.transport import GrpcTransport, Transport
from clients.wire import Answer, Call, call_from_options, recommendations_from_answer
from ensemble.options import Id, Ids, RequestOptions

RETRY_SHARE = 0.1  # retries per call, in the long run
_RETRY_BURST = 10.0
_RECONNECT_S = 0.05


class ClientCore:
    """Does all that the sync and the asyncio client share: everything but the waiting."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        budget_ms: float | None = None,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._transport = transport or GrpcTransport(url, headers=headers)
        self._budget_ms = budget_ms
        self._retries = 1.0
        self._lock = threading.Lock()

    def connect(self, timeout_s: float = 2.0) -> bool:
        """Tells whether the server answers within `timeout_s`.

        Nobody needs to call it, but the first request then finds the connection made and the server's version
        known.
        """
        return self._transport.connect(timeout_s)

    def close(self) -> None:
        """Ends the connection, after a short wait for calls that were given up: cutting them off could end
        an old server."""
        self._transport.close()

    def _call(
        self, user_ids: Ids, options: Mapping[str, Any], budget_ms: float | None, per_user: bool
    ) -> Call:
        return call_from_options(
            user_ids, options, self._budget_ms if budget_ms is None else budget_ms, per_user
        )

    def _count_call(self) -> None:
        with self._lock:
            self._retries = min(_RETRY_BURST, self._retries + RETRY_SHARE)

    def _retry_delay_s(self, error: CallError, attempt: int, left_s: float | None) -> float | None:
        """Gives the seconds until the one retry, or None when the error is the answer. A recommendation
        changes nothing, so that asking again is safe."""
        delay_s = _RECONNECT_S * random.uniform(0.5, 1.5) if error.status == "UNAVAILABLE" else 0.0
        if attempt or not error.retryable or (left_s is not None and left_s <= delay_s):
            return None
        with self._lock:
            if self._retries < 1:
                return None
            self._retries -= 1
        return delay_s

    def _budget_exceeded(self, call: Call, future: Future[Answer] | None) -> BudgetExceeded:
        if future is not None:
            self._transport.give_up(future)
        return BudgetExceeded(f"budget_ms: no answer within {call.budget_ms:g} ms", "DEADLINE_EXCEEDED")


def left_s(call: Call, started: float) -> float | None:
    """Gives the seconds that are left of the call's budget; None without a budget."""
    return None if call.budget_ms is None else call.budget_ms / 1000 - (time.perf_counter() - started)


class Client(ClientCore):
    """Asks a served release for ranked lists; safe to share between threads.

    url        host:port of the server's gRPC endpoint
    budget_ms  of calls that name none; None: such a call waits until it is answered
    headers    sent with every call, for example the control header of a server.json
    transport  another way to the server: clients.transport.FakeTransport in an application's tests
    """

    def recommend(
        self,
        user_id: Id,
        *,
        budget_ms: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Recommendations:
        """Gives one user's list; raises InvalidArgument, Overloaded, BudgetExceeded, Unavailable or
        ServerFault."""
        return self._answer(self._call([user_id], options, budget_ms, per_user=False))[0]

    def recommend_many(
        self, user_ids: Ids, *, budget_ms: float | None = None, **options: Any
    ) -> list[Recommendations]:
        """Gives the lists of several users in one request; each option of `recommend` is shared, or a list
        with one value per user."""
        return self._answer(self._call(user_ids, options, budget_ms, per_user=True))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call) -> list[Recommendations]:
        started, attempt = time.perf_counter(), 0
        self._count_call()
        while True:
            try:
                answer = self._wait(call, started)
                break
            except CallError as error:
                delay_s = self._retry_delay_s(error, attempt, left_s(call, started))
                if delay_s is None:
                    raise
                time.sleep(delay_s)
                attempt += 1
        return recommendations_from_answer(call, answer, (time.perf_counter() - started) * 1000)

    def _wait(self, call: Call, started: float) -> Answer:
        if call.budget_ms is None:
            return self._transport.send(call)
        future = self._transport.start(call)
        try:
            return future.result(left_s(call, started))
        except TimeoutError:
            raise self._budget_exceeded(call, future) from None

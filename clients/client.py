"""Asks a served release for ranked lists: Client(url).recommend(user) gives Recommendations.

clients.aio.AsyncClient does the same for asyncio, with the same arguments.

    from clients import Client

    with Client("127.0.0.1:8001") as client:
        for item in client.recommend("u42", top_k=5, session_items=["lipstick-7"]).items:
            print(item.item_id, item.score, item.probabilities)

The options are those of ensemble.options.RequestOptions, all optional; one of recommend_many is shared by its
users, or a list with one value each. Wherever a list is taken, a numpy array is too. `budget_ms` says for how
many milliseconds to wait; `request_id` is what the server's log calls the request (never a user's id, for
many read logs), by default its trace's id or one by chance.

Where nobody answers in time, or at all, the list is the one that the release gives to everybody
(Degraded.POPULAR), if a first answer has come before and the request sets no filters; else BudgetExceeded or
Unavailable is raised.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, Unpack

from clients.errors import BudgetExceeded, CallError, InvalidArgument, Overloaded
from clients.fallback import Popular
from clients.policy import (
    HEDGE_BURST,
    HEDGE_SHARE,
    MAX_IN_FLIGHT,
    RETRY_BURST,
    RETRY_SHARE,
    Allowance,
    Gate,
    Latencies,
    Servers,
)
from clients.results import Recommendations
from clients.search import Picture, call_of_search
from clients.tls import Tls
from clients.tracing import CallSpan
from clients.transport import GrpcTransport, Transport
from clients.wire import Answer, Call, call_from_options, recommendations_from_answer
from ensemble.options import Id, Ids, RequestOptions

_RECONNECT_S = 0.05
HIGH, NORMAL = "high", "normal"


class Wait(NamedTuple):
    """Asks to wait for any of some calls; where there are none, for a while."""

    calls: tuple[Future[Answer], ...]
    seconds: float | None


class _Turn(NamedTuple):
    """Is one call in flight of a request."""

    transport: Transport
    began: float


class ClientCore:
    """Does all that the sync and the asyncio client share: everything but the waiting."""

    _may_block = False  # a call that nothing else waits for is sent without a detour by another thread

    def __init__(
        self,
        url: str | Sequence[str] = "127.0.0.1:8001",
        *,
        budget_ms: float | None = None,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        fallback: bool | None = None,
        tls: Tls | None = None,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise InvalidArgument("url: at least one server is needed")
        transports = (
            [transport] if transport else [GrpcTransport(one, headers=headers, tls=tls) for one in urls]
        )
        self._servers, self._budget_ms = Servers(transports), budget_ms
        self._latencies = Latencies()
        self._gate = Gate(max_in_flight, self._latencies)
        self._retries = Allowance(RETRY_SHARE, RETRY_BURST)
        self._hedges = Allowance(HEDGE_SHARE, HEDGE_BURST, HEDGE_BURST)
        self._popular = Popular(lambda call: self._servers.next().start(call))
        self._has_popular = transport is None if fallback is None else fallback

    def connect(self, timeout_s: float = 2.0) -> bool:
        """Tells whether the server answers within `timeout_s`.

        Nobody needs to call it, but the first request then finds the connection made and the server's version
        known.
        """
        answered = [one.connect(timeout_s) for one in self._servers.transports]
        return any(answered)

    def close(self) -> None:
        """Ends the connections, after a short wait for calls that were given up: cutting them off could end
        an old server."""
        for one in self._servers.transports:
            one.close()

    def _call(
        self,
        user_ids: Ids,
        options: Mapping[str, Any],
        budget_ms: float | None,
        per_user: bool,
        request_id: str | None,
    ) -> Call:
        budget_ms = self._budget_ms if budget_ms is None else budget_ms
        return call_from_options(user_ids, options, budget_ms, per_user, request_id)

    def _search_call(
        self,
        user_id: Id,
        text: str,
        image: Picture | None,
        options: Mapping[str, Any],
        budget_ms: float | None,
        request_id: str | None,
    ) -> Call:
        budget_ms = self._budget_ms if budget_ms is None else budget_ms
        return call_of_search(user_id, text, image, options, budget_ms, request_id)

    def _asked(self, call: Call, priority: str) -> Generator[Wait, None, list[Recommendations]]:
        """Answers a call, in the caller's trace if there is one: yields what to wait for, and gives the lists
        in the end."""
        span = CallSpan(call)
        try:
            results = yield from self._lists(span.call, priority)
        except BaseException as error:
            if isinstance(error, CallError):
                error.request_id = span.call.request_id
            span.end((), error)
            raise
        span.end(results, None)
        return results

    def _lists(self, call: Call, priority: str) -> Generator[Wait, None, list[Recommendations]]:
        """Answers a call; where nobody does, with everybody's list."""
        if priority not in (HIGH, NORMAL):
            raise InvalidArgument(f"priority: must be {HIGH!r} or {NORMAL!r}, got {priority!r}")
        self._gate.enter(is_high=priority == HIGH)
        started = time.perf_counter()
        try:
            answer = yield from self._first_answer(call, started)
        except CallError as error:
            # Everybody's list is no answer to a search
            asks = not call.contents
            popular = self._popular.answer(call, (time.perf_counter() - started) * 1e3) if asks else []
            if not popular or (isinstance(error, Overloaded) and call.budget_ms is None):
                raise
            return popular
        finally:
            self._gate.leave()
        results = recommendations_from_answer(call, answer, (time.perf_counter() - started) * 1000)
        if self._has_popular:
            self._popular.learn(results[0].release, call)
        return results

    def _first_answer(self, call: Call, started: float) -> Generator[Wait, None, Answer]:
        """Asks one server, another one where it fails, and a second one where it is late; gives the first
        answer. The others are given up, never cancelled."""
        self._retries.earn()
        self._hedges.earn()
        turns, tried, fault = dict[Future[Answer], _Turn](), list[Transport](), CallError("nobody was asked")
        may_hedge = is_due = True
        try:
            while True:
                left = left_s(call, started)
                if left is not None and left <= 0:
                    raise BudgetExceeded(
                        f"budget_ms: no answer within {call.budget_ms:g} ms", "DEADLINE_EXCEEDED"
                    )
                if is_due:
                    is_due = False
                    try:
                        turns |= self._start(call, left, tried)
                    except CallError as error:
                        fault = error
                if not turns:
                    delay_s = self._retry_delay_s(fault, tried, left)
                    if delay_s is None:
                        raise fault
                    if delay_s:
                        yield Wait((), delay_s)
                    is_due = True
                    continue
                hedge_s = self._hedge_in_s(turns) if may_hedge and len(turns) == 1 else None
                yield Wait(tuple(turns), min((t for t in (left, hedge_s) if t is not None), default=None))
                for done in [one for one in turns if one.done()]:
                    turn = turns.pop(done)
                    failure = done.exception()
                    if failure is None:
                        self._latencies.note(time.perf_counter() - turn.began)
                        return done.result()
                    if not isinstance(failure, CallError):
                        raise failure
                    fault = failure
                    self._servers.note_error(turn.transport, failure)
                if hedge_s is not None and len(turns) == 1 and self._hedge_in_s(turns) <= 0:
                    may_hedge = False
                    is_due = self._hedges.take()
        finally:
            for future, turn in turns.items():
                turn.transport.give_up(future)

    def _start(self, call: Call, left: float | None, tried: list[Transport]) -> dict[Future[Answer], _Turn]:
        """Sends a call with the budget that is left."""
        transport = self._servers.next(tried)
        tried.append(transport)
        sent = call if left is None else replace(call, budget_ms=left * 1e3)
        try:
            if self._may_block and left is None and len(self._servers.transports) == 1:
                return {_done(transport, sent): _Turn(transport, time.perf_counter())}
            return {transport.start(sent): _Turn(transport, time.perf_counter())}
        except CallError as error:
            self._servers.note_error(transport, error)
            raise

    def _hedge_in_s(self, turns: Mapping[Future[Answer], _Turn]) -> float:
        """Gives the seconds until the call in flight is unusually late."""
        began = min(turn.began for turn in turns.values())
        return max(0.0, began + self._latencies.hedge_after_s - time.perf_counter())

    def _retry_delay_s(
        self, error: CallError, tried: Sequence[Transport], left: float | None
    ) -> float | None:
        """Gives the seconds until the next try, or None when the error is the answer. A recommendation
        changes nothing, so that asking again is safe.

        Every other server is asked once; the same one again only now and then: a retry is one more request.
        """
        has_another = len({id(one) for one in tried}) < len(self._servers.transports)
        is_gone = error.status in ("UNAVAILABLE", "NOT_FOUND")
        if not error.retryable:
            return None
        if has_another and is_gone:
            return 0.0
        delay_s = _RECONNECT_S * random.uniform(0.5, 1.5) if error.status == "UNAVAILABLE" else 0.0
        if len(tried) > len(self._servers.transports) or (left is not None and left <= delay_s):
            return None
        return delay_s if self._retries.take() else None


def _done(transport: Transport, call: Call) -> Future[Answer]:
    """Waits for a call's answer, and gives it as a future that is done."""
    future = Future[Answer]()
    future.set_result(transport.send(call))
    return future


def left_s(call: Call, started: float) -> float | None:
    """Gives the seconds that are left of the call's budget; None without a budget."""
    return None if call.budget_ms is None else call.budget_ms / 1000 - (time.perf_counter() - started)


class Client(ClientCore):
    """Asks a served release for ranked lists; safe to share between threads.

    url        host:port of the server's gRPC endpoint, or several that answer alike: asked by turns; where
               one is not there, stops or is unusually late, another is asked
    budget_ms  of calls that name none; None: such a call waits until it is answered
    headers    sent with every call, for example the control header of a server.json
    max_in_flight  more calls at once are refused with Overloaded, those of priority "normal" at four fifths
               of it; its `retry_after_s` says when to ask again
    fallback   whether to keep the list for everybody; by default yes, but not of another `transport`
    tls        Tls("ca.crt", "me.crt", "me.key"): to a gateway, encrypted, with this client's certificate
    transport  another way to the server: clients.transport.FakeTransport in an application's tests
    """

    _may_block = True

    def recommend(
        self,
        user_id: Id,
        *,
        budget_ms: float | None = None,
        priority: str = NORMAL,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Recommendations:
        """Gives one user's list; raises InvalidArgument, Overloaded, BudgetExceeded, Unavailable or
        ServerFault."""
        return self._answer(self._call([user_id], options, budget_ms, False, request_id), priority)[0]

    def recommend_many(
        self,
        user_ids: Ids,
        *,
        budget_ms: float | None = None,
        priority: str = NORMAL,
        request_id: str | None = None,
        **options: Any,
    ) -> list[Recommendations]:
        """Gives the lists of several users in one request; each option of `recommend` is shared, or a list
        with one value per user."""
        return self._answer(self._call(user_ids, options, budget_ms, True, request_id), priority)

    def search(
        self,
        user_id: Id,
        text: str = "",
        *,
        image: Picture | None = None,
        budget_ms: float | None = None,
        priority: str = NORMAL,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Recommendations:
        """Gives one user's list of what fits a text, a picture (a file's bytes, or its path), both, or the
        items `like`; items say in `finders` what brought them. Errors as of `recommend`."""
        return self._answer(
            self._search_call(user_id, text, image, options, budget_ms, request_id), priority
        )[0]

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call, priority: str) -> list[Recommendations]:
        asked = self._asked(call, priority)
        try:
            wanted = next(asked)
            while True:
                if wanted.calls:
                    wait(wanted.calls, wanted.seconds, FIRST_COMPLETED)
                else:
                    time.sleep(wanted.seconds or 0.0)
                wanted = next(asked)
        except StopIteration as end:
            answer: list[Recommendations] = end.value
            return answer
        finally:
            asked.close()

"""Asks a served release for ranked lists from asyncio: clients.client.Client's arguments, results and errors.

A cancelled task stops waiting, nothing more: the call itself lives in gRPC's own threads and runs to its end,
because a cancelled call can kill an old server.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Unpack

from clients.client import ClientCore, left_s
from clients.errors import CallError
from clients.results import Recommendations
from clients.wire import Answer, Call, recommendations_from_answer
from ensemble.options import Id, Ids, RequestOptions


class AsyncClient(ClientCore):
    """Asks a served release for ranked lists; takes Client's arguments."""

    async def recommend(
        self,
        user_id: Id,
        *,
        budget_ms: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Recommendations:
        """Gives one user's list, with Client.recommend's options and errors."""
        return (await self._answer(self._call([user_id], options, budget_ms, per_user=False)))[0]

    async def recommend_many(
        self, user_ids: Ids, *, budget_ms: float | None = None, **options: Any
    ) -> list[Recommendations]:
        """Gives the lists of several users in one request, as Client.recommend_many does."""
        return await self._answer(self._call(user_ids, options, budget_ms, per_user=True))

    async def aclose(self) -> None:
        """Closes the client without holding up the loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _answer(self, call: Call) -> list[Recommendations]:
        started, attempt = time.perf_counter(), 0
        self._count_call()
        while True:
            try:
                answer = await self._wait(call, started)
                break
            except CallError as error:
                delay_s = self._retry_delay_s(error, attempt, left_s(call, started))
                if delay_s is None:
                    raise
                await asyncio.sleep(delay_s)
                attempt += 1
        return recommendations_from_answer(call, answer, (time.perf_counter() - started) * 1000)

    async def _wait(self, call: Call, started: float) -> Answer:
        future = self._transport.start(call)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.wait_for(waiting, left_s(call, started))
        except TimeoutError:
            raise self._budget_exceeded(call, future) from None
        except asyncio.CancelledError:
            self._transport.give_up(future)
            raise

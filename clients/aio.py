"""Asks a served release for ranked lists from asyncio: clients.client.Client's arguments, results and errors.

A cancelled task stops waiting, nothing more: the call itself lives in gRPC's own threads and runs to its end,
because a cancelled call can kill an old server.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Unpack

from clients.client import NORMAL, ClientCore
from clients.results import Recommendations
from clients.search import Picture
from clients.wire import Answer, Call
from ensemble.options import Id, Ids, RequestOptions


class AsyncClient(ClientCore):
    """Asks a served release for ranked lists; takes Client's arguments."""

    async def recommend(
        self,
        user_id: Id,
        *,
        budget_ms: float | None = None,
        priority: str = NORMAL,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Recommendations:
        """Gives one user's list, with Client.recommend's options and errors."""
        return (await self._answer(self._call([user_id], options, budget_ms, False, request_id), priority))[0]

    async def recommend_many(
        self,
        user_ids: Ids,
        *,
        budget_ms: float | None = None,
        priority: str = NORMAL,
        request_id: str | None = None,
        **options: Any,
    ) -> list[Recommendations]:
        """Gives the lists of several users in one request, as Client.recommend_many does."""
        return await self._answer(self._call(user_ids, options, budget_ms, True, request_id), priority)

    async def search(
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
        """Gives one user's list of what fits a query, with Client.search's arguments and errors."""
        call = self._search_call(user_id, text, image, options, budget_ms, request_id)
        return (await self._answer(call, priority))[0]

    async def aclose(self) -> None:
        """Closes the client without holding up the loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _answer(self, call: Call, priority: str) -> list[Recommendations]:
        asked, mine = self._asked(call, priority), dict[Future[Answer], asyncio.Future[Answer]]()
        try:
            wanted = next(asked)
            while True:
                for one in wanted.calls:
                    if one not in mine:
                        mine[one] = asyncio.wrap_future(one)
                        mine[one].add_done_callback(_looked_at)
                waiting = {mine[one] for one in wanted.calls}
                if waiting:
                    await asyncio.wait(waiting, timeout=wanted.seconds, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(wanted.seconds or 0.0)
                wanted = next(asked)
        except StopIteration as end:
            answer: list[Recommendations] = end.value
            return answer
        finally:
            asked.close()


def _looked_at(done: asyncio.Future[Answer]) -> None:
    """Takes an error note of, so that asyncio does not complain that nobody did."""
    done.cancelled() or done.exception()

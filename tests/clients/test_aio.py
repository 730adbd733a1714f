"""The asyncio client: what the sync one does, and that a cancelled task leaves the call alone."""

from __future__ import annotations

import asyncio
import inspect
import time

import pytest
from fake_triton import FakeTriton

from clients.aio import AsyncClient
from clients.client import Client
from clients.errors import BudgetExceeded, InvalidArgument, Overloaded, Unavailable
from clients.transport import FakeTransport, GrpcTransport


def test_both_clients_take_the_same_arguments() -> None:
    for name in ("recommend", "recommend_many", "__init__"):
        ours, theirs = inspect.signature(getattr(AsyncClient, name)), inspect.signature(getattr(Client, name))
        assert list(ours.parameters.values()) == list(theirs.parameters.values())


def test_recommend_and_batches() -> None:
    async def body() -> None:
        async with AsyncClient(transport=FakeTransport({"u": ["x", "y"]})) as client:
            assert (await client.recommend("u", top_k=2)).item_ids == ("x", "y")
            assert [r.item_ids for r in await client.recommend_many(["u", "v"])] == [("x", "y"), ()]

    asyncio.run(body())


@pytest.mark.alone
def test_errors_budget_and_retry() -> None:
    async def body() -> None:
        away = Unavailable("away", "INTERNAL", retryable=True)
        client = AsyncClient(
            transport=FakeTransport({"u": ["x"]}, failures=[away, InvalidArgument("top_k: no")])
        )
        with pytest.raises(InvalidArgument, match=r"^top_k: no$"):
            await client.recommend("u")
        assert (await client.recommend("u")).items
        slow = AsyncClient(transport=FakeTransport({"u": ["x"]}, delay_s=0.5))
        started = time.perf_counter()
        with pytest.raises(BudgetExceeded, match=r"^budget_ms: no answer within 20 ms$"):
            await slow.recommend("u", budget_ms=20)
        assert time.perf_counter() - started < 0.3

    asyncio.run(body())


def test_a_cancelled_task_does_not_cancel_the_call() -> None:
    triton = FakeTriton()
    transport = GrpcTransport(triton.url)

    async def body() -> None:
        client = AsyncClient(transport=transport)
        await client.recommend("u")
        triton.delay_s = 0.3
        task = asyncio.create_task(client.recommend("u"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transport.num_abandoned == 1

    asyncio.run(body())  # ends the loop while the call runs on
    transport.close()
    assert (transport.num_abandoned, triton.cancelled, len(triton.requests)) == (0, 0, 2)
    triton.stop()


def test_cancelled_tasks_are_bounded_too() -> None:
    triton = FakeTriton()
    transport = GrpcTransport(triton.url, max_abandoned=3)

    async def body() -> None:
        async with AsyncClient(transport=transport) as client:
            await client.recommend("u")
            triton.delay_s = 0.4
            tasks = [asyncio.create_task(client.recommend("u")) for _ in range(3)]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(Overloaded):
                await client.recommend("u")

    asyncio.run(body())
    triton.stop()


def test_many_at_once_on_one_channel() -> None:
    triton = FakeTriton()

    async def body() -> None:
        async with AsyncClient(triton.url) as client:
            results = await asyncio.gather(*(client.recommend(f"u{i}") for i in range(200)))
        assert [r.user_id for r in results] == [f"u{i}" for i in range(200)]

    asyncio.run(body())
    triton.stop()

"""A client whose servers fail, stop, are late or have too much to do: who is asked when, what is given."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from fake_triton import FakeTriton

from clients import AsyncClient, Client, Degraded, InvalidArgument, Overloaded, Unavailable
from clients.errors import BudgetExceeded, CallError
from clients.fallback import Popular
from clients.policy import NORMAL_SHARE, Allowance, Latencies
from clients.wire import Answer, Call

DRAINING = ("UNAVAILABLE", "Request for unknown model: 'recommend' has no available versions")
CUT_SHORT = ("INVALID_ARGUMENT", "incomplete string data for inference input 'user_id'")


@pytest.fixture
def tritons() -> Iterator[list[FakeTriton]]:
    both = [FakeTriton(), FakeTriton()]
    yield both
    for one in both:
        one.stop()


def asked(triton: FakeTriton) -> int:
    """Calls for users, without those for the list for everybody."""
    return sum(request.raw_input_contents[0] != b"\0\0\0\0" for request in triton.requests)


def settle(client: Client) -> None:
    """Asks once, and waits until the list for everybody is there."""
    client.recommend("u1")
    deadline = time.monotonic() + 5
    while client._popular._list is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_several_servers_are_asked_by_turns(tritons: list[FakeTriton]) -> None:
    with Client([one.url for one in tritons]) as client:
        for _ in range(10):
            client.recommend("u1")
    assert all(asked(one) >= 4 for one in tritons)


def test_who_drains_is_left_and_nobody_notices(tritons: list[FakeTriton]) -> None:
    gone, stays = tritons
    gone.failures = [DRAINING] * 100
    with Client([gone.url, stays.url]) as client:
        for _ in range(50):
            assert client.recommend("u1").degraded == 0
        assert asked(gone) < 5
        gone.stop()
        assert all(client.recommend("u1").degraded == 0 for _ in range(20))


def test_a_late_answer_is_asked_for_elsewhere_and_nothing_is_cancelled(tritons: list[FakeTriton]) -> None:
    slow, quick = tritons
    slow.delay_s = 2.0
    with Client([slow.url, quick.url], fallback=False) as client:
        client._servers._turn = 1  # the slow one comes next
        began = time.perf_counter()
        assert client.recommend("u1").items
        assert time.perf_counter() - began < 1.5
        assert (asked(slow), asked(quick)) == (1, 1)
    assert slow.cancelled == 0, "close() waits for what was abandoned"


def test_second_calls_stay_within_their_share() -> None:
    allowance = Allowance(0.05, 20, 20)
    taken = 0
    for _ in range(1000):
        allowance.earn()
        taken += allowance.take()
    assert taken <= 20 + 50
    latencies = Latencies()
    for _ in range(200):
        latencies.note(0.05)
    assert latencies.hedge_after_s == pytest.approx(0.1)


def test_another_callers_malformed_request_is_not_ours() -> None:
    triton = FakeTriton()
    triton.failures = [CUT_SHORT]
    with Client(triton.url, fallback=False) as client:
        assert client.recommend("u1").items
        triton.failures = [CUT_SHORT] * 2
        with pytest.raises(Unavailable, match="together with another caller's, whose ids were cut short"):
            client.recommend("u1")
    triton.stop()


def test_when_nobody_answers_the_list_is_everybodys_and_says_so() -> None:
    triton = FakeTriton()
    with Client(triton.url, budget_ms=300) as client:
        settle(client)
        triton.delay_s = 1.0
        began = time.perf_counter()
        late = client.recommend("u2", top_k=1)
        assert time.perf_counter() - began < 0.3 + 0.05
        assert (late.user_id, late.item_ids, late.release) == ("u2", ("i1",), "r1")
        assert Degraded.POPULAR | Degraded.RANK_SKIPPED in late.degraded
        one, two = client.recommend_many(["a", "b"], exclude_items=[["i1"], []], top_k=[5, 1])
        assert (one.item_ids, two.item_ids) == (("item-2",), ("i1",))
        with pytest.raises(BudgetExceeded):
            client.recommend("u2", allow={"brand": ["X"]})
        triton.delay_s = 0.0
        triton.failures = [("INVALID_ARGUMENT", "top_k: must be 1..9, got 99")]
        with pytest.raises(InvalidArgument):
            client.recommend("u2", top_k=99)
        triton.stop()
        assert Degraded.POPULAR in client.recommend("u3").degraded
        assert Degraded.POPULAR in asyncio.run(once_async(client, "u3")).degraded
    assert len(triton.requests) - asked(triton) == 1, "fetched once a release"


async def once_async(client: Client, user: str):  # type: ignore[no-untyped-def]
    other = AsyncClient(client._servers.transports[0].url, budget_ms=300)
    other._popular = client._popular
    async with other:
        return await other.recommend(user)


def test_without_a_list_the_error_stands() -> None:
    triton = FakeTriton()
    triton.delay_s = 0.3
    with Client(triton.url) as client, pytest.raises(BudgetExceeded):
        client.recommend("u1", budget_ms=20)
    triton.stop()


def test_what_is_too_much_is_refused_at_once_the_important_last() -> None:
    triton = FakeTriton()
    with Client(triton.url, max_in_flight=10) as client:
        settle(client)
        triton.delay_s = 0.5
        most = int(10 * NORMAL_SHARE)
        threads = [threading.Thread(target=client.recommend, args=("u1",)) for _ in range(most)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        began = time.perf_counter()
        with pytest.raises(Overloaded, match="8 calls of this client are in flight already") as caught:
            client.recommend("u1")
        assert time.perf_counter() - began < 0.02
        assert caught.value.retry_after_s > 0
        assert client.recommend("u1", priority="high").items
        for thread in threads:
            thread.join()
        assert client.recommend("u1").items
        with pytest.raises(InvalidArgument, match="priority: must be 'high' or 'normal'"):
            client.recommend("u1", priority="urgent")
    triton.stop()


class Fetches:
    """Starts calls for everybody's list, and answers none by itself."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.replies: list[Future[Answer]] = []
        self.popular = Popular(self._start)

    def _start(self, call: Call) -> Future[Answer]:
        self.depths.append(call.parameters["top_k"])
        self.replies.append(Future())
        return self.replies[-1]


def test_everybodys_list_is_fetched_once_a_release() -> None:
    fetches = Fetches()
    for _ in range(10):  # a canary and the main release, by turns
        for release in ("r1", "r2"):
            fetches.popular.learn(release, Call((b"u1",), {}))
    assert fetches.depths == [100, 100]


def test_a_shop_that_refuses_a_long_list_is_asked_for_as_many_as_it_has_answered() -> None:
    fetches = Fetches()
    fetches.popular.learn("r1", Call((b"u1", b"u2"), {"top_k": "[5, 20]"}))
    fetches.replies[0].set_exception(InvalidArgument("top_k: must be 1..50, got 100"))
    assert fetches.depths == [100, 20]
    fetches.popular.learn("r1", Call((b"u1",), {"top_k": 20}))
    fetches.popular.learn("r1", Call((b"u1",), {"top_k": 30}))
    assert fetches.depths == [100, 20, 30]
    fetches.replies[-1].set_exception(InvalidArgument("top_k: must be 1..20, got 30"))
    fetches.popular.learn("r1", Call((b"u1",), {"top_k": 30}))
    assert fetches.depths == [100, 20, 30], "what is refused is not asked for with each answer"


def test_a_list_that_could_not_be_fetched_is_asked_for_again() -> None:
    fetches = Fetches()
    for _ in range(2):
        fetches.popular.learn("r1", Call((b"u1",), {}))
    fetches.replies[0].set_exception(CallError("gone"))
    fetches.popular.learn("r1", Call((b"u1",), {}))
    assert len(fetches.depths) == 2

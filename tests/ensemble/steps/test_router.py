"""A route's requests are split, answered by both releases and put together; what the canary fails the main
release answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument, ReleaseError
from ensemble.options import parameters_of, read_parameters
from ensemble.release.route import Route, Share
from ensemble.steps import routing
from ensemble.steps.router import REQUEST_ID, CallFailed, FusedRouter, Request, Router
from ensemble.steps.routing import Counts, Part, joined, parts_of, wait_s

ROUTE = Route((Share("r1", 0.5), Share("r2", 0.5)), "salt", 7)
USERS = np.array([[f"u{number}".encode()] for number in range(12)], object)
PLACES = ROUTE.places(USERS[:, 0].tolist())


def answer_of(release: str, user_ids: np.ndarray, top_k: int = 3) -> dict[str, np.ndarray]:
    """Lists of `top_k` items that say who was asked for whom."""
    names = [f"{release}:{user.decode()}:{at}".encode() for (user,) in user_ids for at in range(top_k)]
    scores = np.linspace(2, 1, top_k, dtype=np.float32)[None].repeat(len(user_ids), 0)
    return {
        "item_ids": np.array(names, object).reshape(len(user_ids), top_k),
        "scores": scores,
        "probabilities": scores[..., None],
        "degraded": np.zeros((len(user_ids), 1), np.int64),
        "release": np.full((len(user_ids), 1), release.encode(), object),
    }


class Releases:
    """Two releases: what they were asked, and how they fail. It is a Router's functions, and a pipeline."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[bytes], dict]] = []
        self.fails: dict[str, Exception] = {}
        self.hangs = threading.Event()
        self.hangs.set()

    def check(self, release, user_ids, parameters):
        if parameters.get("top_k", 1) == -1:
            raise InvalidArgument("top_k: must be 1..50, got -1")

    def ask(self, release, user_ids, parameters):
        self.asked.append((release, user_ids[:, 0].tolist(), dict(parameters)))
        if release == "r2":
            self.hangs.wait(20)
        if release in self.fails:
            raise self.fails[release]
        tops = json.loads(str(parameters.get("top_k", 3)))
        return answer_of(release, user_ids, max(tops) if isinstance(tops, list) else tops)

    def pipeline(self, release: str):
        releases = self

        class Pipeline:
            def prepare(self, user_ids, parameters):
                releases.check(release, user_ids, parameters)
                return user_ids, parameters

            def run(self, prepared):
                return [releases.ask(release, *one) for one in prepared]

        return Pipeline()


@pytest.fixture
def releases():
    releases = Releases()
    yield releases
    releases.hangs.set()


@pytest.fixture(params=["calls", "fused"])
def answered(request, releases):
    """Asks a router of either kind: (requests) -> answers or errors, and its counts by release."""
    router = Router(ROUTE, releases.ask, releases.check)
    fused = FusedRouter(ROUTE, [releases.pipeline(name) for name in ROUTE.releases])

    async def gather(requests):
        calls = [router.answer(*one) for one in requests]
        return await asyncio.gather(*calls, return_exceptions=True)

    def ask(*requests: Request):
        answers = fused.answer(requests) if request.param == "fused" else asyncio.run(gather(requests))
        return answers, (fused if request.param == "fused" else router).counts

    return ask


def test_mixed_users_are_answered_by_their_releases_in_their_order(answered, releases):
    each = list(range(1, 13))
    (answer,), counts = answered(Request(USERS, json.dumps({"top_k": json.dumps(each), "caps": "{}"})))
    owners = [ROUTE.releases[place] for place in PLACES]
    assert answer["release"][:, 0].tolist() == [name.encode() for name in owners]
    assert [ids[0].split(b":")[1] for ids in answer["item_ids"]] == USERS[:, 0].tolist()
    assert answer["scores"].shape == (12, 12)
    for name, users, parameters in releases.asked:
        mine = [at for at in range(12) if owners[at] == name]
        assert users == USERS[mine, 0].tolist()
        assert json.loads(parameters["top_k"]) == [each[at] for at in mine], "each its own values"
        assert parameters["caps"] == "{}"
        widest = max(each[at] for at in mine)
        assert (answer["item_ids"][mine, widest:] == b"").all()
        assert (answer["scores"][mine, widest:] == 0).all()
    assert len(releases.asked) == 2, "each release once"
    assert [(one.requests, one.lists) for one in counts] == [(1, 12 - PLACES.sum()), (1, PLACES.sum())]


def test_one_that_is_wrong_harms_no_other(answered, releases):
    good = Request(USERS[:3], "{}")
    wrong = [
        Request(USERS, '{"top_k": -1}'),
        Request(USERS, json.dumps({"top_k": "[1, 2]"})),
        Request(USERS[:1], '{"diversity": }'),
        Request(USERS, "[1]"),
    ]
    answers, counts = answered(good, *wrong, good)
    for answer in (answers[0], answers[-1]):
        assert answer["release"][:, 0].tolist() == [ROUTE.releases[place].encode() for place in PLACES[:3]]
    texts = [str(error) for error in answers[1:-1]]
    assert all(isinstance(error, InvalidArgument) for error in answers[1:-1])
    assert texts[:2] == [
        "top_k: must be 1..50, got -1",
        "top_k: 2 values for 12 users; give one value for all, or one each",
    ]
    assert sum(one.refused for one in counts) >= 1
    assert sum(one.failed for one in counts) == 0


def test_what_the_canary_fails_the_main_release_answers_and_says_so(answered, releases):
    releases.fails["r2"] = ValueError("of whatever kind")
    (answer, alone), (main, canary) = answered(Request(USERS, "{}"), Request(USERS[PLACES == 0], "{}"))
    assert set(answer["release"][:, 0]) == {b"r1"}
    assert answer["degraded"][:, 0].tolist() == [int(Degraded.CANARY_FAILED) * place for place in PLACES]
    assert not alone["degraded"].any()
    assert (canary.requests, canary.failed, canary.lists) == (1, 1, 0)
    assert (main.requests, main.failed, main.lists) == (2, 0, 2 * (PLACES == 0).sum()), "its own only"


def test_a_canary_that_hangs_is_not_waited_for_long(answered, releases, monkeypatch):
    releases.hangs.clear()
    started = time.monotonic()
    (answer,), (_, canary) = answered(Request(USERS, "{}", budget_us=200_000))
    assert 0.05 < time.monotonic() - started < 1, "half of the budget"
    assert answer["degraded"][:, 0].tolist() == [int(Degraded.CANARY_FAILED) * place for place in PLACES]
    assert canary.failed == 1
    releases.hangs.set()


def test_when_all_its_calls_hang_nobody_waits_any_more(releases):
    releases.hangs.clear()
    router = Router(ROUTE, releases.ask, releases.check, (4, 2))
    mine = USERS[PLACES == 1]

    async def run() -> list[float]:
        took = []
        for _ in range(4):
            started = time.monotonic()
            answer = await router.answer(mine, "{}", 200_000)
            assert (answer["degraded"] == Degraded.CANARY_FAILED).all()
            took.append(time.monotonic() - started)
        releases.hangs.set()
        await asyncio.sleep(0.2)
        assert (await router.answer(mine, "{}"))["release"][0, 0] == b"r2", "it answers again"
        return took

    took = asyncio.run(run())
    assert min(took[:2]) > 0.09
    assert max(took[2:]) < 0.09


def test_a_fused_canary_that_hangs_is_asked_again_when_it_is_through(releases):
    releases.hangs.clear()
    router = FusedRouter(ROUTE, [releases.pipeline(name) for name in ROUTE.releases])
    mine = Request(USERS[PLACES == 1], "{}", 100_000)
    for _ in range(2):
        (answer,) = router.answer([mine])
        assert (answer["degraded"] == Degraded.CANARY_FAILED).all()
    assert [name for name, *_ in releases.asked].count("r2") == 1
    releases.hangs.set()
    time.sleep(0.1)
    (answer,) = router.answer([mine])
    assert answer["release"][0, 0] == b"r2"


def test_what_the_main_release_fails_is_told_with_its_code(releases, answered):
    releases.fails["r1"] = CallFailed("no planet", 14)
    (error,), (main, _) = answered(Request(USERS[PLACES == 0], "{}"))
    assert isinstance(error, CallFailed)
    assert str(error) == "no planet"
    assert main.failed == 1
    releases.fails["r2"] = ReleaseError("nor this one")
    (error,), _ = answered(Request(USERS[PLACES == 1], "{}"))
    assert str(error) == "no planet", "the last resort failed"


def test_a_canarys_part_of_the_budget():
    assert [wait_s(us) for us in (0, 100_000, 10_000_000)] == [0.5, 0.05, 0.5]


def test_parts_and_their_join_are_inverse(rng):
    for _ in range(50):
        places = rng.integers(0, 2, rng.integers(1, 9))
        values = rng.random((len(places), 4)).astype(np.float32)
        parts = parts_of(places)
        assert [set(places[part.users]) for part in parts] == [{part.place} for part in parts]
        back = joined(parts, [{"scores": values[part.users]} for part in parts])
        assert (back["scores"] == values).all()
    assert parts_of(np.array([1, 1]))[0].place == 1
    wide = joined(
        [Part(0, np.array([1])), Part(1, np.array([0]))],
        [{"item_ids": np.array([[b"a", b"b"]], object)}, {"item_ids": np.array([[b"c"]], object)}],
    )
    assert wide["item_ids"].tolist() == [[b"c", b""], [b"a", b"b"]]


def test_parameters_are_cut_to_their_users_and_none_is_judged():
    raw = read_parameters(
        json.dumps(
            {
                "top_k": 3,
                "exclude_seen": json.dumps([True, False, True]),
                "session_items": json.dumps([["a"], [], ["b"]]),
                "exclude_items": json.dumps(["x", "y", "z"]),
                "unknown": json.dumps([1, 2, 3]),
                "timeout": 5,
            }
        )
    )
    assert parameters_of(raw, [2, 0], 3) == {
        "top_k": 3,
        "exclude_seen": "[true, true]",
        "session_items": '[["b"], ["a"]]',
        "exclude_items": '["x", "y", "z"]',  # one list for all
        "unknown": "[1, 2, 3]",
    }
    assert read_parameters("") == read_parameters("null") == {}


def test_counts_know_empty_and_flat_lists_and_bins():
    counts = Counts()
    answer = answer_of("r1", USERS[:3])
    answer["scores"][1] = 0.5
    answer["scores"][2] = answer["probabilities"][2] = 0
    answer["degraded"][1] = 2
    counts.answer(0.0101, answer, 0.01)
    assert (counts.requests, counts.lists, counts.degraded, counts.empty) == (1, 3, 1, 2)
    (at,) = np.flatnonzero(counts.seconds)
    assert routing.edge_s(at - 1) < 0.0101 <= routing.edge_s(at)
    counts.answer(0.0, answer_of("r1", USERS[:1], 1), 0.5)
    counts.answer(1e9, answer_of("r1", USERS[:1], 1), 0.5)
    assert (counts.seconds[0], counts.seconds[-1], counts.empty) == (1, 1, 2), "one item is no flat list"
    assert counts.scores.sum() == 5
    assert counts.late == 2
    assert json.loads(json.dumps(counts.to_json()))["lists"] == 5


def test_requests_of_the_main_releases_users_take_one_thread(releases):
    router, answers = Router(ROUTE, releases.ask, releases.check), list[object]()
    done = threading.Semaphore(0)

    def note(answer: object) -> None:
        answers.append(answer)
        done.release()

    mine, mixed = USERS[PLACES == 0], USERS
    assert not router.start_main(Request(mixed, "{}"), note)
    releases.asked.clear()
    requests = [Request(mine, "{}"), Request(mine, '{"top_k": -1}'), Request(mine, "[")]
    for request in requests:
        assert router.start_main(request, note)
        assert done.acquire(timeout=5)
    answer, refused, unread = answers
    assert set(answer["release"][:, 0]) == {b"r1"}
    assert isinstance(refused, InvalidArgument)
    assert isinstance(unread, InvalidArgument)
    releases.fails["r1"] = CallFailed("no planet", 14)
    router.start_main(requests[0], note)
    assert done.acquire(timeout=5)
    assert answers[-1] is releases.fails["r1"]
    (main, canary) = router.counts
    assert (main.requests, main.refused, main.failed, canary.requests) == (4, 2, 1, 0)


def test_both_releases_are_told_the_requests_id(releases):
    told = list[tuple[str, str]]()

    def ask(release, user_ids, parameters):
        told.append((release, REQUEST_ID.get()))
        return releases.ask(release, user_ids, parameters)

    router = Router(ROUTE, ask, releases.check)
    asyncio.run(router.answer(*Request(USERS, "{}", request_id="page-7")))
    assert sorted(told) == [("r1", "page-7"), ("r2", "page-7")]
    done = threading.Event()
    assert router.start_main(Request(USERS[PLACES == 0], "{}", request_id="page-8"), lambda _: done.set())
    assert done.wait(5)
    assert told[-1] == ("r1", "page-8")


def test_what_fails_tells_no_caller_what_an_exception_says(answered, releases):
    releases.fails["r1"] = ValueError("no room for user u1")
    (error,), _ = answered(Request(USERS[PLACES == 0], "{}"))
    assert "u1" not in str(error)
    assert "ValueError" in str(error)

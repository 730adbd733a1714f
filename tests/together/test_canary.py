"""A canary meets everything: mixed users and options, live items, a release that fails or hangs, promotion
and abort under load. Served both ways, callers see no failure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from asking import TritonAsker
from variants import FEW, fails_for_few, hangs_for_few, publish_variant, ranker

from clients import Client
from clients.errors import CallError, InvalidArgument
from clients.items import ItemClient
from clients.operations import canaries, releases
from clients.operations.listing import list_releases
from ensemble.contract import Degraded
from ensemble.live.keeper import service_process
from ensemble.release import route as route_module
from ensemble.release.canary import CANARY, read_canary
from ensemble.release.route import read_route
from ensemble.server import canary_watch
from ensemble.server.control import Control
from ensemble.server.options import ServeOptions
from ensemble.server.running import running_server
from ensemble.server.supervisor import Server, serve

USERS = [f"u{number}" for number in range(1, 61)]


@pytest.fixture(scope="module")
def repository(two_releases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r1, active, and r2; and two that are well as long as their own users are asked."""
    folder = tmp_path_factory.mktemp("canary")
    shutil.copytree(two_releases, folder / "repository", symlinks=True)
    for name, edit in (("fails", fails_for_few), ("hangs", hangs_for_few)):
        publish_variant(folder / "repository", "r2", name, folder, ranker(edit))
    return folder / "repository"


# The router is a model of its own in the ensemble alone: that way is the one that `make test` tries.
@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["ensemble", "fused"]
)
def served(request, repository) -> Iterator[tuple[Server, list[str]]]:
    said: list[str] = []
    releases.activate(repository, "r1")
    options = ServeOptions(port=0, metrics_port=0, fused=request.param)
    with serve(repository, options, said.append) as server, service_process(repository):
        yield server, said


@pytest.fixture(autouse=True)
def only_r1(served, repository, monkeypatch) -> None:
    """Each test begins with r1 for all. The twin has asked r2 when it was first tried (test_twin.py)."""
    monkeypatch.setattr(releases, "ask_twin", lambda release: None)
    if read_route(repository).releases != ("r1",):
        releases.activate(repository, "r1")


class Load:
    """Callers that ask for one user or three, and what they got."""

    def __init__(self, url: str, callers: int = 3) -> None:
        self.answers: list = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, n)) for n in range(callers)]

    def _ask(self, url: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with Client(url) as client:
            while not self._stop.is_set():
                users = rng.choice(USERS, rng.choice([1, 1, 3]), replace=False).tolist()
                try:
                    self.answers += client.recommend_many(users, top_k=5)
                except CallError as error:
                    self.errors.append(str(error))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def until(holds, within_s: float = 60.0, otherwise=lambda: "it does not come") -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


def loaded(repository: Path) -> set[str]:
    with Control(running_server(repository)) as control:
        return {model.partition("_")[0] for model in control.models()} - {"recommend"}


def still_there(repository: Path, server: Server) -> str:
    """Says what Triton and the system know of processes and models that should have gone."""
    with Control(running_server(repository)) as control:
        return f"processes {server.stubs()}, models {control._index()}"


@pytest.mark.triton
def test_users_are_split_as_the_route_says_whatever_they_ask(served, repository):
    """Mixed users in one request, options of each user, one request that is wrong among good ones."""
    server, _ = served
    canaries.canary(repository, "r2", 0.4)
    route = read_route(repository)
    owners = [route.releases[place].encode() for place in route.places([user.encode() for user in USERS])]
    assert 10 < owners.count(b"r2") < 40
    ids = [user.encode() for user in USERS[:6]]
    options = {"top_k": json.dumps([1, 2, 3, 4, 5, 6]), "diversity": 0.5, "exclude_seen": False}
    requests = [
        (ids, options),
        ([ids[0]], {"top_k": 3}),
        (ids, {"weights": json.dumps({"ctr": 1.0})}),
        (ids[::-1], {"session_items": json.dumps([["i1"], ["i2", "i3"], [], [], ["i5"], []])}),
    ]
    asker = TritonAsker(server.url)
    try:
        alone = [asker.ask(*request) for request in requests]
        again = asker.ask_all(requests * 8)
        for place, answer in enumerate([*alone, *again]):
            users, _ = requests[place % len(requests)]
            assert answer["release"][:, 0].tolist() == [owners[USERS.index(user.decode())] for user in users]
            assert not answer["degraded"].any()
            for name in ("item_ids", "scores"):
                want = alone[place % len(requests)][name]
                assert answer[name].shape == want.shape
                same = (
                    (answer[name] == want)
                    if name == "item_ids"
                    else np.isclose(answer[name], want, atol=1e-4)
                )
                assert same.mean() > 0.9, "batch-mates change nothing"
        given = (alone[0]["item_ids"] != b"").sum(axis=1)
        assert given.tolist() == [1, 2, 3, 4, 5, 6]
        wrong = [{"top_k": -1}, {"top_k": "[1]"}, {"nothing": 1}, {"weights": '{"x": 1}'}]
        with Client(server.url) as client, Load(server.url) as load:
            for parameters in wrong:
                with pytest.raises(Exception, match=r"INVALID_ARGUMENT|top_k|nothing|weights") as caught:
                    asker.ask(ids, parameters)
                assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
            with pytest.raises(InvalidArgument, match=r"^top_k: must be 1\.\.50, got 51"):
                client.recommend_many(USERS[:5], top_k=51)
            until(lambda: len(load.answers) > 100)
    finally:
        asker.close()
    assert load.errors == []
    assert all(one.release.encode() == owners[USERS.index(one.user_id)] for one in load.answers), "sticky"


@pytest.mark.triton
def test_shares_grow_and_shrink_under_load_and_nothing_is_lost(served, repository):
    server, _ = served
    with Load(server.url) as load:
        done = canaries.canary(repository, "r2", 0.1)
        assert (done.share, done.main, done.served, done.warning) == (0.1, "r1", True, "")
        few = set(of_canary(repository))
        assert [(one.name, one.share, one.is_active) for one in list_releases(repository)[-2:]] == [
            ("r1", 0.9, True),
            ("r2", 0.1, False),
        ]
        assert canaries.canary(repository, "r2", 0.5).share == 0.5
        assert few <= set(of_canary(repository)), "whoever was the canary's stays it"
        assert loaded(repository) == ({"r1", "route"} if len(server.stubs()) < 5 else {"r1", "r2", "route"})
        canaries.abort(repository)
        assert (read_route(repository).releases, loaded(repository)) == (("r1",), {"r1"})
        canaries.canary(repository, "r2", 0.2)
        assert canaries.promote(repository).share == 1.0
        assert (read_route(repository).releases, loaded(repository)) == (("r2",), {"r2"})
        canaries.canary(repository, "r1", 0.3)  # back, by a canary of its own
        releases.activate(repository, "r1")
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 20)
        assert {one.release for one in load.answers[seen + 10 :]} == {"r1"}
    assert load.errors == []
    assert {one.release for one in load.answers} == {"r1", "r2"}
    # On a machine that stalls the canary may be late for its part of the budget: r1 answers, and says so.
    late = [one for one in load.answers if one.degraded & Degraded.CANARY_FAILED]
    assert len(late) <= 0.05 * len(load.answers)
    assert {one.release for one in late} <= {"r1"}


def of_canary(repository: Path) -> list[str]:
    """The users of the route's canary."""
    places = read_route(repository).places([user.encode() for user in USERS])
    return [user for user, place in zip(USERS, places, strict=True) if place]


@pytest.mark.triton
@pytest.mark.parametrize("name", ["fails", pytest.param("hangs", marks=pytest.mark.long)])
def test_a_canary_that_fails_is_taken_out_by_itself_and_callers_see_nothing(
    served, repository, name, monkeypatch
):
    server, said = served
    monkeypatch.setattr(route_module.secrets, "token_hex", lambda _: salt_of_many(repository, name))
    said.clear()
    process = server.pid
    # Callers come when it is tried already: those who came before, few at once, would make it late when it is
    # asked about many, and on a busy machine it would be refused.
    canaries.canary(repository, name, 0.5)
    with Load(server.url) as load:
        until(lambda: read_route(repository).releases == ("r1",))
        by = read_route(repository).by
        until(lambda: any("is taken out" in line for line in said))
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 20)
    assert load.errors == []
    flagged = [one for one in load.answers if one.degraded & Degraded.CANARY_FAILED]
    assert flagged
    assert {one.release for one in flagged} == {"r1"}
    assert not any(one.degraded & Degraded.CANARY_FAILED for one in load.answers[seen + 10 :])
    (line,) = [line for line in said if "is taken out" in line]
    assert line.startswith(f"canary {name} (0.5 of the users) is taken out, r1 answers all users: ")
    assert "requests failed or were late; the main release: " in line
    assert by.startswith("guard@")
    until(lambda: loaded(repository) == {"r1"})
    until(
        lambda: all(model.startswith("r1_") for model in server.stubs()),
        otherwise=lambda: still_there(repository, server),
    )
    time.sleep(1.5)
    assert server.pid == process, "tritonserver goes on"


def salt_of_many(repository: Path, name: str) -> str:
    """A salt with which the release is asked about FEW to 8 of its own users, the most that an engine runs at
    once: it fails for the few that are left of more."""
    users = [user.encode() for user in read_canary(repository / name / CANARY).user_ids]
    salts = map(str, range(1000))
    return next(s for s in salts if FEW <= (route_module.user_hashes(users, s) < 0.5).sum() <= 8)


@pytest.mark.triton
def test_items_added_during_a_canary_are_seen_from_both_releases(served, repository):
    server, _ = served
    canaries.canary(repository, "r2", 0.5)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(server.url))
        items = stack.enter_context(ItemClient(repository, wait_s=10))
        item = f"new-{time.monotonic_ns()}"
        changed = items.upsert({"item_id": item, "brand": item})
        answers = client.recommend_many(USERS[:20], allow={"brand": [item]})
        assert {one.release for one in answers} == {"r1", "r2"}
        assert {one.item_ids for one in answers} == {(item,)}
        assert {one.sequence for one in answers} == {changed.sequence}
        items.delete(item)
        assert {one.item_ids for one in client.recommend_many(USERS[:20], allow={"brand": [item]})} == {()}
        canaries.promote(repository)
        assert client.recommend("u1", allow={"brand": [item]}).item_ids == ()


@pytest.mark.triton
def test_a_process_of_the_canary_that_dies_takes_it_out(served, repository):
    server, said = served
    said.clear()
    canaries.canary(repository, "r2", 0.3)
    # Who dies before it is watched is replaced, and that is all.
    until(lambda: any("it is watched" in line for line in said))
    route = read_route(repository)
    model = f"route_{route.sequence}" if len(server.stubs()) < 5 else "r2_ranker"
    process = server.pid
    os.kill(server.stubs()[model][0], signal.SIGKILL)
    until(lambda: any("is taken out" in line for line in said))
    assert f"processes of {model} died" in next(line for line in said if "is taken out" in line)
    assert (read_route(repository).releases, server.pid) == (("r1",), process)
    with Client(server.url) as client:
        assert {one.release for one in client.recommend_many(USERS)} == {"r1"}


@pytest.mark.long
@pytest.mark.triton
def test_a_server_that_may_not_change_the_route_spares_its_own_callers(served, repository, monkeypatch):
    server, said = served
    monkeypatch.setattr(canary_watch, "may_change", lambda home: False)
    monkeypatch.setattr(route_module.secrets, "token_hex", lambda _: salt_of_many(repository, "fails"))
    said.clear()
    canaries.canary(repository, "fails", 0.5)
    with Load(server.url) as load:
        until(lambda: any("is followed: release r1 is served" in line for line in said))
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 20)
    assert load.errors == []
    assert {one.release for one in load.answers[seen + 10 :]} == {"r1"}
    assert "is left out by this server, r1 answers its users: " in "".join(said)
    assert read_route(repository).releases == ("r1", "fails"), "other servers go on with it"
    canaries.abort(repository)
    assert read_route(repository).releases == ("r1",)
    canaries.canary(repository, "r2", 0.5)  # a later canary is tried again
    with Client(server.url) as client:
        until(lambda: {one.release for one in client.recommend_many(USERS)} == {"r1", "r2"})

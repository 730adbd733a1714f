"""A server follows its home's route by itself; where it cannot, it says so once, goes on, and tries again."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
from as_nobody import run_as_nobody, why_not
from toy_repository import allow_toys, publish_toy
from variants import answering

from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.repository import aliases_of, put_route
from ensemble.release.route import Route, Share, next_route, read_route
from ensemble.server import following
from ensemble.server.checks import check_servable
from ensemble.server.following import Follower, is_same, route_in
from ensemble.server.left_out import leave_out, may_change, without_left_out
from ensemble.server.mount import Busy, Mount
from ensemble.server.options import ServeOptions
from ensemble.server.running import RunningServer
from ensemble.server.supervisor import serve
from ensemble.server.turning import Turning


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_toys(monkeypatch)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("r1", "r2"):
        publish_toy(tmp_path / "models", name, tmp_path, activate=name == "r1")
    return tmp_path / "models"


def to(home: Path, name: str) -> Route:
    return next_route(read_route(home), [Share(name, 1.0)])


class Followed:
    """Is a server whose turns are counted, and fail when they are told to."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = repository.parent / "home"
        self.home.mkdir()
        self.mount, self.turns, self.said, self.fault = Mount(repository.parent), list[str](), list[str](), ""
        self.repository = repository
        self.mount.point(to(self.home, "r1"), aliases_of(repository, "r1"))
        monkeypatch.setattr(following, "_LOOKS_S", 0.01)
        monkeypatch.setattr(following, "_FIRST_PAUSE_S", 0.1)
        monkeypatch.setattr(Turning, "follow", lambda turning, route: self._turn(route))
        state, home = str(repository.parent), str(self.home)
        server = RunningServer(1, "127.0.0.1:1", None, "h", "s", state, home)
        self.follower = Follower(server, repository, "r1", self.said.append)

    def _turn(self, route: Route) -> str:
        self.turns.append(route.main)
        if self.fault:
            raise ReleaseError(self.fault)
        self.mount.point(route, aliases_of(self.repository, route.main))
        return ""

    def run(self, seconds: float) -> None:
        stopping = threading.Event()
        thread = threading.Thread(target=self.follower.run, args=(stopping, lambda: True))
        thread.start()
        time.sleep(seconds)
        stopping.set()
        thread.join()


@pytest.fixture
def followed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Followed:
    return Followed(repository, monkeypatch)


def test_a_route_is_followed_once(followed):
    followed.run(0.1)
    assert followed.turns == [], "without a route it is what was named"
    put_route(followed.repository, to(followed.home, "r2"), followed.home)
    followed.run(0.3)
    assert followed.turns == ["r2"]
    assert followed.said == [f"the route of {followed.home} is followed: release r2 is served"]


def test_what_cannot_be_followed_is_said_once_and_tried_again_ever_more_seldom(followed):
    followed.fault = "there is no plan; compile"
    put_route(followed.repository, to(followed.home, "r2"), followed.home)
    followed.run(0.55)
    assert 2 <= len(followed.turns) <= 3, "after 0.1 and 0.2 s, not at each look"
    assert followed.said == [
        f"WARNING: the route of {followed.home} cannot be followed: there is no plan; compile; what is "
        "served goes on, and it is tried again"
    ]
    followed.fault = ""
    put_route(followed.repository, to(followed.home, "r1"), followed.home)
    put_route(followed.repository, to(followed.home, "r2"), followed.home)
    followed.run(0.1)
    assert followed.mount.route().main == "r2", "another route is tried at once"


def test_a_damaged_route_is_said_and_what_is_served_goes_on(followed):
    (followed.home / ".route.json").write_text("[")
    followed.run(0.3)
    assert followed.turns == []
    assert len(followed.said) == 1
    assert ".route.json is no route" in followed.said[0]


def test_while_a_command_turns_the_server_it_waits(followed):
    put_route(followed.repository, to(followed.home, "r2"), followed.home)
    with followed.mount.turning(0.0):
        followed.run(0.1)
        with pytest.raises(Busy), followed.mount.turning(0.05):
            pass
    assert (followed.turns, followed.said) == ([], [])
    followed.run(0.2)
    assert followed.turns == ["r2"]


def test_the_same_route_is_the_same_whoever_wrote_it_when():
    one, salted = Route((Share("r1", 1.0),), "a", 1), Route((Share("r1", 1.0),), "b", 2, "now", "me")
    assert is_same(one, salted), "nobody is split by it"
    split = (Share("r1", 0.9), Share("r2", 0.1))
    assert not is_same(Route(split, "a", 1), Route(split, "b", 2))
    assert not is_same(one, Route(split, "a", 1))


def test_a_home_without_a_route_is_served_by_the_release_that_is_named(repository, tmp_path):
    (home := tmp_path / "home").mkdir()
    (repository / "recommend" / "config.pbtxt").unlink()
    with pytest.raises(ReleaseError, match=r"^no release is active in .*; `peregrine release activate NAME`"):
        check_servable(repository, print, home)
    assert check_servable(repository, print, home, "r2") == "r2"
    assert route_in(repository, home, "r2").releases == ("r2",)
    put_route(repository, to(home, "r1"), home)
    assert check_servable(repository, print, home, "r1") == "r1"
    with pytest.raises(
        InvalidInput, match=r"^--route r2: .* has a route, which servers follow: release r1 is"
    ):
        check_servable(repository, print, home, "r2")
    with pytest.raises(InvalidInput, match=r"^--catalogue .*none does not exist"):
        check_servable(repository, print, tmp_path / "none")


@pytest.mark.triton
def test_a_real_server_follows_and_goes_on_where_it_cannot(repository, tmp_path):
    publish_toy(repository, "r3", tmp_path, broken="raise ValueError('no such planet')")
    said: list[str] = []  # Triton's own lines among them

    def until_said(words: str) -> None:
        deadline = time.monotonic() + 20
        while not any(words in line for line in said):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=True), said.append):
        put_route(repository, to(repository, "r3"))
        until_said("cannot be followed: load r3_recommend: ")
        assert answering(repository) == "r1", "and nothing of r3 is loaded"
        put_route(repository, to(repository, "r2"))
        until_said("is followed: release r2 is served")
        assert answering(repository) == "r2"


def test_a_canary_that_is_left_out_is_not_followed_and_the_next_one_is(tmp_path):
    split = (Share("r1", 0.9), Share("r2", 0.1))
    left_out, later = Route(split, "a", 4), Route(split, "a", 5)
    assert without_left_out(tmp_path, left_out) == left_out
    leave_out(tmp_path, left_out)
    assert without_left_out(tmp_path, left_out).shares == (Share("r1", 1.0),)
    assert without_left_out(tmp_path, later) == later, "somebody has changed the route since"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_who_may_only_read_a_home_may_not_change_its_route(tmp_path):
    program = "import sys; from ensemble.server.left_out import may_change; print(may_change(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        assert run_as_nobody(Path(folder), program, [folder], 30).stdout.strip() == "False"
    assert may_change(tmp_path)

"""A canary is begun, changed, promoted and aborted by commands, with a server or without; killed anywhere it
is finished or undone; what cannot be tried is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from shops import ROOT
from toy_repository import allow_toys, publish_toy
from tritonclient.grpc.model_config_pb2 import ModelConfig

import peregrine
from clients.operations import canaries, releases
from clients.operations.listing import list_releases
from ensemble.contract import Degraded
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release import activation
from ensemble.release.repository import put_route
from ensemble.release.route import Share, next_route, read_route
from ensemble.server.checks import check_servable
from ensemble.server.control import Control
from ensemble.server.following import route_in
from ensemble.server.options import ServeOptions
from ensemble.server.router_files import check_same
from ensemble.server.running import running_server
from ensemble.server.supervisor import serve

OPTIONS = ServeOptions(port=0, metrics_port=None, instances=1)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_toys(monkeypatch)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    for name in ("r2", "r3"):
        publish_toy(tmp_path / "models", name, tmp_path)
    return tmp_path / "models"


def shares(repository: Path) -> dict[str, float]:
    return {one.release: one.share for one in route_in(repository, repository).shares}


def test_a_canary_on_disk_is_begun_grown_promoted_and_aborted(repository):
    done = canaries.canary(repository, "r2", 0.05)
    assert (done.release, done.share, done.main, done.served) == ("r2", 0.05, "r1", False)
    assert shares(repository) == {"r1": 0.95, "r2": 0.05}
    alias = (repository / "recommend" / "config.pbtxt").read_text()
    assert alias == (repository / "r1" / "alias.pbtxt").read_text(), (
        "a server without routes has the main one"
    )
    salt = read_route(repository).salt
    assert canaries.canary(repository, "r2", 0.2).share == 0.2
    assert read_route(repository).salt == salt
    assert [(one.name, one.share, one.is_active) for one in list_releases(repository)] == [
        ("r1", 0.8, True),
        ("r2", 0.2, False),
        ("r3", 0.0, False),
    ]
    assert check_servable(repository, print) == "r1"
    assert canaries.abort(repository).share == 0
    assert shares(repository) == {"r1": 1.0}
    canaries.canary(repository, "r3", 0.5)
    assert canaries.promote(repository).main == "r3"
    assert shares(repository) == {"r3": 1.0}
    assert read_route(repository).sequence == 6, "the alias that was there counts as the first"


def test_what_cannot_be_tried_is_refused_with_its_cure(repository):
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(InvalidInput, match="a canary has more than 0% and less than 100%"):
            canaries.canary(repository, "r2", share)
    with pytest.raises(InvalidInput, match="r1 is active: it has the users already"):
        canaries.canary(repository, "r1", 0.5)
    with pytest.raises(ReleaseError, match="no release 'r9'"):
        canaries.canary(repository, "r9", 0.5)
    for command in (canaries.promote, canaries.abort):
        with pytest.raises(InvalidInput, match="no release is tried: r1 has all users") as caught:
            command(repository)
        assert caught.value.cure == "peregrine release canary NAME --share PERCENT"
    canaries.canary(repository, "r2", 0.5)
    with pytest.raises(InvalidInput, match="release r2 is tried already: promote or abort it before"):
        canaries.canary(repository, "r3", 0.5)
    with pytest.raises(ReleaseError, match=r"release r2 is tried by 0\.5 of the users"):
        releases.remove(repository, "r2")
    with pytest.raises(InvalidInput, match="--require tensorrt: no server is at work"):
        canaries.promote(repository, "tensorrt")
    assert shares(repository) == {"r1": 0.5, "r2": 0.5}
    releases.activate(repository, "r3")
    assert shares(repository) == {"r3": 1.0}, "whoever activates ends a canary"


def test_releases_that_answer_otherwise_cannot_share_users(repository):
    path = repository / "r2" / "alias.pbtxt"
    alias = text_format.Parse(path.read_text(), ModelConfig())
    next(one for one in alias.output if one.name == "probabilities").dims[1] += 1  # another task
    path.write_text(text_format.MessageToString(alias))
    with pytest.raises(ReleaseError) as caught:
        check_same(repository, ("r1", "r2"))
    assert str(caught.value) == (
        "releases r1 and r2 cannot share the users: probabilities of their answers differ in shape, as with "
        "other tasks; activate the new one instead"
    )


def test_the_command_line(repository, capsys, monkeypatch):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peregrine", "release", *arguments, "-r", str(repository)])
        with pytest.raises(SystemExit) as end:
            peregrine.main()
        return int(end.value.code or 0), *capsys.readouterr()

    assert run("canary", "r2", "--share", "5")[:2] == (
        0,
        "release r2 has 0.05 of the users, r1 the others; no server is running here\n",
    )
    assert "95%" in run("list")[1]
    assert json.loads(run("canary", "r2", "--share", "10", "--json")[1])["share"] == 0.1
    assert run("abort")[1] == "release r2 has no users any more, r1 has all; no server is running here\n"
    assert run("abort")[0] == 2
    run("canary", "r2", "--share", "5")
    assert run("promote")[1] == "release r2 has all users: it is active; no server is running here\n"
    code, _, error = run("canary", "r3", "--share", "100")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: --share 100: a canary has more than 0% and less than 100% of the users")


# Steps of a command that change something, in their order
STEPS = {
    "canary": ("ask", "put_route", "load alias"),
    "abort": ("put_route",),
    "promote": ("load", "put_route"),
}
KILLED = """\
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from clients.operations import canaries, releases
from ensemble.server import group
from ensemble.server.control import Control
repository, command, step = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
def killing(owner, name, when=lambda *arguments: True):
    real = getattr(owner, name)
    def call(*arguments, **options):
        result = real(*arguments, **options)
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
releases.foreign._is_ours = releases.ask_twin = lambda what: True
if step == "load alias":
    killing(Control, "load", lambda self, model, *_: model == "recommend")
elif step == "load":
    killing(Control, "load", lambda self, model, *_: model != "recommend")
else:
    killing({"begin": group.activation, "ask": Control, "put_route": group}[step], step)
canaries.canary(repository, "r2", 0.3) if command == "canary" else getattr(canaries, command)(repository)
"""


def kill_after(repository: Path, command: str, step: str) -> None:
    arguments = [str(ROOT), str(repository), command, step]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.triton
def test_a_change_killed_after_any_step_is_ended_by_the_next_command(repository):
    """The route on disk tells what is finished; nothing else stays loaded."""
    with serve(repository, OPTIONS):
        for command, steps in STEPS.items():
            for step in steps:
                before = {"r1": 1.0} if command == "canary" else {"r1": 0.5, "r2": 0.5}
                restore(repository, before)
                kill_after(repository, command, step)
                after = {"canary": {"r1": 0.7, "r2": 0.3}, "abort": {"r1": 1.0}, "promote": {"r2": 1.0}}[
                    command
                ]
                is_finished = step in ("put_route", "load alias")
                assert shares(repository) == (after if is_finished else before), (command, step)
                what = {"promote": "promotion"}.get(command, command)
                main = next(iter(shares(repository)))
                end = "finished" if is_finished else f"undone: {main} is active"
                assert releases.settle(repository) == f"the {what} of r2, which was killed, is {end}"
                assert activation.unfinished(repository) is None
                assert answering(repository) == set(shares(repository))


def restore(repository: Path, wanted: dict[str, float]) -> None:
    """Makes the route r1 alone, or r1 and r2."""
    if shares(repository) == wanted:
        return
    releases.activate(repository, "r1")
    if len(wanted) > 1:
        canaries.canary(repository, "r2", wanted["r2"])


def answering(repository: Path) -> set[str]:
    """The releases that answer many users; what else is loaded is the route's router."""
    with Control(running_server(repository)) as control:
        found = set()
        for start in range(0, 40, 8):
            users, answer = [f"u{number}" for number in range(start, start + 8)], None
            while (
                answer is None or (answer["degraded"] & Degraded.CANARY_FAILED).any()
            ):  # late: a busy machine
                answer = control.ask("recommend", users, {"top_k": 3})
            found |= {name.decode() for name in answer["release"].ravel().tolist()}
        route = route_in(repository, repository)
        router = {"route"} if route.canary else set()
        loaded = {model.partition("_")[0] for model in control.models()}
        assert loaded == {"recommend", *route.releases, *router}
        routers = [model for model in control.models() if model.startswith("route_")]
        assert routers == ([f"route_{route.sequence}"] if route.canary else [])
    return found


@pytest.mark.triton
def test_serve_begins_with_a_canary_and_without_one_that_cannot_load(repository, tmp_path):
    canaries.canary(repository, "r2", 0.5)
    with serve(repository, OPTIONS):
        assert answering(repository) == {"r1", "r2"}
    publish_toy(repository, "bad", tmp_path, broken="raise ValueError('no such planet')")
    put_route(repository, next_route(read_route(repository), [Share("r1", 0.5), Share("bad", 0.5)]))
    said: list[str] = []
    with serve(repository, OPTIONS, said.append):
        assert answering(repository) == {"r1"}
    assert any("canary bad (0.5 of the users) is taken out, r1 answers all users" in line for line in said)
    assert "no such planet" in "\n".join(said)
    (repository / "r3_ranker" / "config.pbtxt").unlink()
    put_route(repository, next_route(read_route(repository), [Share("r1", 0.5), Share("r3", 0.5)]))
    said.clear()
    with serve(repository, OPTIONS, said.append):
        assert answering(repository) == {"r1"}
    assert any("is taken out" in line and "r3_ranker/config.pbtxt" in line for line in said)

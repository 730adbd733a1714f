"""`peregrine status` says in one screen, or in strict JSON, how a repository is served and what is wrong."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from toy_repository import allow_toys, publish_toy
from typer.testing import CliRunner

import peregrine
from ensemble.release.audit import FILE as AUDIT
from ensemble.release.audit import last_changes
from ensemble.release.repository import put_route
from ensemble.release.route import Share, next_route
from ensemble.server.health import HEALTH, READY
from ensemble.server.options import ServeOptions
from ensemble.server.running import Claim, RunningServer
from ensemble.server.scrape import LastMinute, counts_from
from ensemble.server.supervisor import serve


@pytest.fixture(autouse=True)
def toys(monkeypatch) -> None:
    allow_toys(monkeypatch)


@pytest.fixture
def repository(tmp_path) -> Path:
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    return tmp_path / "models"


def status(*arguments: str):
    return CliRunner().invoke(peregrine._app(peregrine.COMMANDS["status"]), [*arguments])


def facts(repository: Path, *more: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(status("-r", str(repository), "--json", *more).stdout, parse_constant=refuse)


def test_without_a_server_it_says_so_and_exits_with_3(repository):
    shown = status("-r", str(repository))
    assert shown.exit_code == 3
    assert f"no server is at work on {repository}" in shown.output.replace("\n", "")
    assert "peregrine serve" in shown.output
    assert facts(repository)["ready"] is False
    ready = status("-r", str(repository), "--ready")
    assert (ready.exit_code, ready.stdout) == (3, "")


def test_a_repository_that_is_not_there_is_an_error(tmp_path):
    assert "does not exist" in str(status("-r", str(tmp_path / "none")).exception)


def test_every_change_of_the_route_leaves_a_line(repository):
    publish_toy(repository, "r2", repository.parent)
    first = next_route(None, [Share("r1", 1.0)], "anna@shop")
    put_route(repository, first)
    put_route(repository, next_route(first, [Share("r2", 1.0)], "ben@shop"))
    with (repository / AUDIT).open("a") as file:
        file.write('{"cut off by a po')
    newest, oldest = last_changes(repository)
    assert (newest["by"], newest["from"], newest["to"]) == ("ben@shop", {"r1": 1.0}, {"r2": 1.0})
    assert (oldest["by"], oldest["from"]) == ("anna@shop", {})
    shown = facts(repository)
    assert shown["route"]["shares"] == [{"release": "r2", "share": 1.0}]
    assert shown["changes"][0] == newest


def test_what_a_server_last_wrote_is_read_from_a_disk_that_cannot_be_written(repository, tmp_path):
    state = tmp_path / "state"
    claim = Claim(state, repository)
    claim.write(RunningServer(os.getpid(), "127.0.0.1:1", None, "h", "s", str(state), str(repository)))
    model = {"wanted": 2, "alive": 1, "canary_ms": 3.0, "waiting_s": 0.0, "fault": "", "runs_on": "python"}
    minute = {
        "lists": 100.0,
        "flagged": {"features_stale": 5.0, "unknown_user": 50.0},
        "redis_failures": {},
        "open_breakers": 0.0,
    }
    told = {
        "at": time.time() - 60,
        "phase": READY,
        "started": 1.0,
        "since": 1.0,
        "restarts": 2,
        "last_restart": "it died",
        "repairs": 3,
        "models": {"r1_ranker": model},
        "last_minute": minute,
    }
    (state / HEALTH).write_text(json.dumps(told))
    state.chmod(0o500)
    try:
        found = facts(repository)
    finally:
        state.chmod(0o700)
        claim.drop()
    assert found["exit_code"] == 3
    text = "\n".join(f"{one['what']} -> {one['cure']}" for one in found["problems"])
    for words in (
        "nobody listens at 127.0.0.1:1",
        "has not written how it is for 60 s",
        "1 of 2 processes of r1_ranker are alive",
        "was started again 2 times; last: it died",
        "5.0% of the last minute's lists say features_stale",
    ):
        assert words in text
    assert "unknown_user" not in text, "that is the callers' affair"
    assert all(one["cure"] for one in found["problems"])


@pytest.mark.triton
def test_a_server_is_shown_whole_and_then_ill(repository):
    options = ServeOptions(port=0, metrics_port=0, fused=True, state=repository.parent / "state")
    with serve(repository, options) as server:
        deadline = time.monotonic() + 20
        while not (found := facts(repository))["servers"][0]["models"] or found["exit_code"]:
            assert time.monotonic() < deadline, found["problems"]
            time.sleep(0.2)
        [shown] = found["servers"]
        assert shown["models"]["r1_recommend"]["alive"] == 2
        assert (shown["phase"], shown["way"], shown["restarts"]) == ("ready", "fused", 0)
        assert status("-r", str(repository), "--ready").exit_code == 0
        metrics = status("-r", str(repository), "--metrics").stdout
        assert f'peregrine_processes_alive{{url="{server.url}",model="r1_recommend"}} 2' in metrics
        assert "all is well" in status("-r", str(repository)).output
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(0.3)
        began = time.monotonic()
        assert status("-r", str(repository), "--ready").exit_code == 3
        assert time.monotonic() - began < 5, "a probe waits for nobody"
    assert status("-r", str(repository), "--ready").exit_code == 3


def test_a_redis_that_was_never_reached_does_not_answer():
    """Its breaker is closed: nobody has asked it."""
    text = 'peregrine_tier_{0}{{instance="{1}",model="a",tier="redis"}} {2}\n'
    lines = [("breaker_closed", 0, 1), ("tracking", 0, 0), ("breaker_closed", 1, 1), ("tracking", 1, 1)]
    minute = LastMinute(None)
    for now in (0, 5):
        minute.note(now, counts_from("".join(text.format(*line) for line in lines)))
    report = minute.report()
    assert report is not None
    assert report["open_breakers"] == 1.0


def test_the_last_minute_is_what_was_counted_since():
    minute = LastMinute(None)
    assert minute.report() is None
    text = (
        'peregrine_lists{{model="a"}} {0}\nperegrine_lists{{model="b"}} {0}\n'
        'peregrine_lists_degraded{{flag="features_stale",model="a"}} {1}\nnv_other 3\n'
        'peregrine_tier_breaker_closed{{model="a"}} 0\n'
    )
    minute.note(0, counts_from(text.format(10, 0)))
    minute.note(5, counts_from(text.format(60, 1)))
    report = minute.report()
    assert report == {
        "lists": 100.0,
        "flagged": {"features_stale": 1.0},
        "redis_failures": {},
        "open_breakers": 1.0,
    }
    minute.note(10, counts_from(text.format(1, 0)))
    assert minute.report() is None, "tritonserver was started again"

"""Processes that die, are stopped or hang are replaced while the server answers; so is tritonserver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_repository import allow_toys, publish_toy

from clients.operations import releases
from clients.transport import GrpcTransport
from clients.wire import call_from_options
from ensemble.server import leftovers, predecessor
from ensemble.server.illness import BUSY_S, HANGS_S, STOPPED_S, Diagnosis, Stopped
from ensemble.server.leftovers import LEFT_S, Leftovers
from ensemble.server.options import ServeOptions
from ensemble.server.process import Stub
from ensemble.server.restarts import FIRST_TRIES, Restarts
from ensemble.server.running import CLAIM, Claim, RunningServer
from ensemble.server.supervisor import serve
from ensemble.server.watched import Watched
from ensemble.vitals import Vitals, vitals_of

RECOVERS_S = 5.0


@pytest.fixture(autouse=True)
def toys(monkeypatch) -> None:
    allow_toys(monkeypatch)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repairs")
    publish_toy(folder / "models", "r1", folder, activate=True)
    return folder / "models"


class Load:
    """Asks again and again from some threads, without retries; notes when an answer did not come well."""

    def __init__(self, url: str) -> None:
        self.transport, self.stopping = GrpcTransport(url), threading.Event()
        self.failed: list[float] = []  # when a call that failed was sent
        self.answered: list[float] = []  # when a call that did well was sent
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(4)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        while not self.stopping.wait(0.02):
            sent = time.monotonic()
            try:
                self.transport.start(call_from_options(["u1"], {}, None, False)).result(20)
                self.answered.append(sent)
            except Exception:
                self.failed.append(sent)

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()


def whole(server, model: str, but: set[int]) -> bool:
    pids = server.stubs().get(model, [])
    return len(pids) == 2 and not but & set(pids)


def within(limit_s: float, check) -> float:
    """Waits for it; gives the seconds."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < limit_s, "did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.triton
@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.long)], ids=["ensemble", "fused"]
)
def test_what_is_killed_or_stopped_is_replaced_while_the_server_answers(repository, fused):
    said: list[str] = []
    model = "r1_recommend" if fused else "r1_ranker"
    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=fused), log=said.append) as server:
        first = server.pid
        for harm, count in ((signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 2)):
            load, pids = Load(server.url), server.stubs()[model]
            began = time.monotonic()
            for pid in pids[:count]:
                os.kill(pid, harm)
            within(2 * RECOVERS_S, lambda pids=pids: whole(server, model, set(pids)))
            replaced = time.monotonic()
            within(RECOVERS_S, lambda load=load, at=replaced: max(load.answered, default=0) > at)
            load.stop()
            # Triton takes a second to say that a process is dead
            assert all(sent - began < RECOVERS_S for sent in load.failed), (harm, count)
            assert server.pid == first, "tritonserver was started again"
        assert server.num_repairs() == 3
    assert sum("is whole again after" in line for line in said) == 3, said


@pytest.mark.triton
def test_a_process_killed_at_the_very_first_moment_is_replaced(repository):
    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=True)) as server:
        pids = server.stubs()["r1_recommend"]
        os.kill(pids[0], signal.SIGKILL)
        within(RECOVERS_S, lambda: whole(server, "r1_recommend", set(pids)))


@pytest.mark.triton
def test_a_process_that_does_not_end_when_its_model_goes_is_killed(repository, monkeypatch):
    monkeypatch.setattr(leftovers, "LEFT_S", 1.0)
    publish_toy(repository, "r2", repository.parent)
    said: list[str] = []
    with serve(repository, ServeOptions(port=0, metrics_port=None), log=said.append) as server:
        first, (hangs, _) = server.pid, server.stubs()["r1_ranker"]

        def stop_after_the_flip() -> None:
            within(30, lambda: server.route().main == "r2")
            os.kill(hangs, signal.SIGSTOP)

        stopper = threading.Thread(target=stop_after_the_flip)
        stopper.start()
        releases.activate(repository, "r2")
        stopper.join()
        assert hangs in server.stubs()["r1_ranker"], "it waits to be ended"
        within(3 * RECOVERS_S, lambda: not any(model.startswith("r1_") for model in server.stubs()))
        assert any("r1_ranker had not ended" in line for line in said), said
        releases.activate(repository, "r1")
        within(3 * RECOVERS_S, lambda: not any(model.startswith("r2_") for model in server.stubs()))
        assert server.pid == first, "tritonserver was started again"


@pytest.mark.triton
def test_a_stopped_tritonserver_is_started_again(repository):
    said: list[str] = []
    with serve(repository, ServeOptions(port=0, metrics_port=None, fused=True), log=said.append) as server:
        first = server.pid
        os.kill(first, signal.SIGSTOP)
        within(3 * RECOVERS_S, lambda: server.pid != first and server._is_ready.is_set())
        transport = GrpcTransport(server.url)
        assert transport.start(call_from_options(["u1"], {}, None, False)).result(20)
    assert any("tritonserver is stopped; starting it again" in line for line in said), said


# --- without a server


def test_only_who_served_and_serves_no_longer_is_left_over():
    now = [0.0]
    left = Leftovers(lambda: now[0])
    old, new, kept = Stub(1, "r1_ranker", ""), Stub(2, "r2_ranker", ""), Stub(3, "r1_recall", "")
    assert left.look([old, new, kept], {"r1_ranker", "r1_recall"}) == []
    now[0] = LEFT_S
    assert left.look([old, new, kept], {"r2_ranker", "r1_recall"}) == [], "it has just gone"
    now[0] = 1.5 * LEFT_S
    assert left.look([old, new], {"r1_ranker"}) == [], "it is served again"
    now[0] = 2 * LEFT_S
    assert left.look([old, new], {"r2_ranker"}) == []
    now[0] = 3 * LEFT_S
    assert left.look([old, new], {"r2_ranker"}) == [old]
    left.wait_again([old])
    assert left.look([old, new], {"r2_ranker"}) == []
    assert left.look([Stub(4, "r1_ranker", "")], {"r2_ranker"}) == [], "it is being loaded"


class Probed:
    """Stands in for the calls to a server."""

    def __init__(self) -> None:
        self.waits: dict[str, float] = {}

    def waiting_s(self, name: str) -> float:
        return self.waits.get(name, 0.0)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_pause_that_is_short_is_nobodys_business():
    now = [0.0]
    stopped = Stopped(lambda: now[0])
    assert stopped.look({1: Vitals(True, 0)}) == set()
    now[0] = STOPPED_S / 2
    assert stopped.look({1: Vitals(False, 1)}) == set()
    now[0] = STOPPED_S
    assert stopped.look({1: Vitals(True, 1)}) == set()
    now[0] = 2 * STOPPED_S
    assert stopped.look({1: Vitals(True, 1)}) == {1}


def test_who_does_not_answer_is_ill_only_if_it_does_not_run_either(sleeper):
    probes = Probed()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        models = {name: Watched(name, 1, None) for name in ("hangs", "works")}
        stubs = [Stub(sleeper, "hangs", "hangs_0"), Stub(busy.pid, "works", "works_0")]
        diagnosis = Diagnosis(os.getpid(), probes)  # type: ignore[arg-type]
        time.sleep(0.2)  # until the one has slept
        assert diagnosis.look(stubs, models) == ("", [])
        probes.waits = dict.fromkeys(models, 0.1)
        diagnosis.look(stubs, models)
        time.sleep(0.5)
        probes.waits = dict.fromkeys(models, HANGS_S)
        assert [ill.model for ill in diagnosis.look(stubs, models)[1]] == ["hangs"]
        probes.waits = dict.fromkeys(models, BUSY_S)
        assert [ill.model for ill in diagnosis.look(stubs, models)[1]] == ["hangs", "works"]
    finally:
        busy.kill()
        busy.wait()


def test_a_first_start_is_tried_again_unless_the_release_is_at_fault():
    restarts = Restarts()
    lost = {"was_ready": False, "exit_code": -6}
    assert [restarts.pause_s("died", **lost) is None for _ in range(FIRST_TRIES)] == [False, False, True]
    assert Restarts().pause_s("no such planet", was_ready=False, exit_code=1) is None


def test_a_server_that_stops_is_waited_for_and_an_orphan_is_ended(tmp_path, monkeypatch):
    state, said = tmp_path / "state", list[str]()
    monkeypatch.setattr(predecessor, "_ORPHAN_S", 0.2)
    claim = Claim(state, tmp_path)
    claim.write(RunningServer(os.getpid(), "127.0.0.1:1", None, "h", "s"))
    began = time.monotonic()
    predecessor.await_predecessor(state, said.append)
    assert time.monotonic() - began < 1, "who goes on serving is not waited for"
    claim.note_stopping()
    threading.Timer(0.5, claim.drop).start()
    predecessor.await_predecessor(state, said.append)
    assert time.monotonic() - began >= 0.5
    assert not (state / CLAIM).exists()
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", f"--model-repository={state / 'models'}"],
        start_new_session=True,
    )
    try:
        within(5, lambda: predecessor._orphans(state) == [orphan.pid])
        predecessor.await_predecessor(state, said.append)
        assert vitals_of(orphan.pid) is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            orphan.kill()
        orphan.wait()
    assert len(said) == 2, said

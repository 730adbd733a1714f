"""A release that fails in the server is taken out again; a killed activation is finished or undone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shops import ROOT
from toy_repository import allow_toys, publish_toy
from variants import answering

from clients.operations import releases
from ensemble.errors import ReleaseError
from ensemble.release import activation
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import locked, put_route
from ensemble.release.route import Share, next_route, read_route
from ensemble.server.checks import check_servable
from ensemble.server.control import Control
from ensemble.server.options import ServeOptions
from ensemble.server.prepared import prepare_release
from ensemble.server.process import kill_stubs
from ensemble.server.running import running_server
from ensemble.server.supervisor import Server, serve

OPTIONS = ServeOptions(port=0, metrics_port=None, fused=True)
FAULTS = {
    "hangs": (
        "import time; self.execute = lambda requests: time.sleep(3600)",
        "no answer from .* within 8 s",
    ),
    "nan": ("self.scores = [float('nan')] * 3", r"recommend: \d of 6 scores are not finite"),
    "constant": ("self.scores = [1, 1, 1]", "recommend: the scores of every list are constant"),
    "one": ("self.items[1:] = [b''] * 2", "recommend: user 'u1' got 1 items; wanted 3"),
    "far": ("self.items = [b'a', b'b', b'item1']", "recommend: lists share 33% of their items with the"),
    "shape": ("self.outputs['scores']['dims'] = [2]", r"recommend: scores is \[2, 2\]; wanted \[2, 3\]"),
    "lacks": ("del self.outputs['scores']", "lacks_recommend: the answer has no tensor scores"),
    "dies": ("import os; self.execute = lambda requests: os._exit(1)", "ask dies_recommend for 2 users"),
    "raises": ("raise ValueError('no such planet')", "load raises_recommend: .*no such planet"),
}
QUICK = ("hangs", "nan", "shape", "dies", "raises")  # one of each kind; the others are refused alike


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turning")
    publish_toy(folder / "models", "r1", folder, activate=True)
    for name in ("r2", "r3"):
        publish_toy(folder / "models", name, folder)
    for name, (broken, _) in FAULTS.items():
        publish_toy(folder / "models", name, folder, broken=broken)
    return folder / "models"


@pytest.fixture(scope="module")
def server(repository):
    with pytest.MonkeyPatch.context() as patch:
        allow_toys(patch)
        with serve(repository, OPTIONS) as server:
            yield server


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_toys(monkeypatch)


@pytest.mark.triton
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAULTS]
)
def test_what_fails_in_the_server_is_refused_and_gone_within_20_s(repository, server: Server, name):
    process, started = server.pid, time.monotonic()
    with pytest.raises(ReleaseError) as caught:
        releases.activate(repository, name)
    assert time.monotonic() - started < 20
    assert re.match(f"release {name} is not activated, r1 goes on: .*{FAULTS[name][1]}", str(caught.value))
    assert "\n" not in str(caught.value)
    assert answering(repository) == active_release(repository) == "r1"
    assert activation.unfinished(repository) is None
    with locked(repository, wait_s=0):
        pass
    deadline = time.monotonic() + 10
    while any(model.startswith(f"{name}_") for model in server.stubs()):
        assert time.monotonic() < deadline, "its processes are left"
        time.sleep(0.1)
    time.sleep(1.1)  # the supervisor has looked at its stubs since
    assert server.pid == process, "tritonserver was started again"


@pytest.mark.triton
def test_dead_stubs_of_a_release_that_is_not_active_restart_nothing(repository, server):
    releases.activate(repository, "r1")
    process = server.pid
    with Control(running_server(repository)) as control:
        prepare_release(control.server, open_release(repository, "r3"), None)
        control.load("r3_recommend")
        time.sleep(1.5)  # the supervisor has counted its stubs
        assert len(kill_stubs(running_server(repository).pid, "r3")) == 2
        time.sleep(2.5)  # and missed them since
        assert server.pid == process
        control.unload_release("r3")
    assert answering(repository) == "r1"


STEPS = ("begin", "load", "ask", "put_route", "turn", "ask again", "unload")
KILLED = """\
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from clients.operations import releases
from ensemble.server import group
from ensemble.server.control import Control
from ensemble.release import foreign
done = []
def counted(owner, name):
    real = getattr(owner, name)
    def call(*arguments, **options):
        result = real(*arguments, **options)
        done.append(name)
        len(done) < int(sys.argv[3]) or os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
foreign._is_ours = releases.ask_twin = lambda what: True
counted(group.activation, "begin")
counted(group, "put_route")
for name in ("load", "ask", "unload_release"):
    counted(Control, name)
releases.activate(Path(sys.argv[2]), sys.argv[4])
"""


def kill_after(step: str, repository: Path, name: str) -> None:
    """Activates a release in a process that is killed as soon as the step is done."""
    arguments = [str(ROOT), str(repository), str(STEPS.index(step) + 1), name]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    started = activation.unfinished(repository)
    assert (started.what, started.release, started.previous) == (activation.ACTIVATION, name, "r1")


@pytest.mark.triton
@pytest.mark.parametrize("step", STEPS)
def test_an_activation_killed_after_any_step_is_ended_by_the_next_command(repository, server, step):
    """The alias on disk tells what is finished; nothing else stays loaded."""
    releases.activate(repository, "r1")
    kill_after(step, repository, "r2")
    is_finished = STEPS.index(step) >= STEPS.index("put_route")
    assert active_release(repository) == ("r2" if is_finished else "r1")
    if step in ("load", "turn"):  # any command that changes releases
        with pytest.raises(ReleaseError, match="no release 'r9'"):
            releases.remove(repository, "r9")
        said = ()
    else:
        said = releases.activate(repository, active_release(repository)).notes
        end = "finished" if is_finished else "undone: r1 is active"
        assert said == (f"the activation of r2, which was killed, is {end}",)
    assert answering(repository) == active_release(repository) == ("r2" if is_finished else "r1")
    assert activation.unfinished(repository) is None


@pytest.mark.triton
def test_a_killed_activation_whose_release_fails_is_undone(repository, server):
    """It was written into the alias, and does not answer any more."""
    releases.activate(repository, "r1")
    kill_after("begin", repository, "nan")
    put_route(repository, next_route(read_route(repository), [Share("nan", 1.0)]))
    assert releases.settle(repository) == "the activation of nan, which was killed, is undone: r1 is active"
    assert answering(repository) == active_release(repository) == "r1"


@pytest.mark.triton
def test_a_killed_activation_is_ended_by_the_next_serve(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    publish_toy(tmp_path / "models", "r2", tmp_path)
    said: list[str] = []
    with serve(tmp_path / "models", OPTIONS):
        kill_after("put_route", tmp_path / "models", "r2")
    with serve(tmp_path / "models", OPTIONS, said.append):
        assert answering(tmp_path / "models") == "r2"
    assert said == ["the activation of r2, which was killed, is finished"]
    started = activation.Started(activation.ACTIVATION, (Share("r1", 1.0),), (Share("r2", 1.0),))
    activation.begin(tmp_path / "models", started)
    said.clear()
    assert check_servable(tmp_path / "models", said.append) == "r2"
    assert said == ["the activation of r1, which was killed, is undone: r2 is active"]
    assert activation.unfinished(tmp_path / "models") is None
    (tmp_path / "models" / activation.FILE).write_text("[")
    with pytest.raises(ReleaseError, match=r"cannot read .*\.activation\.json, which .*; remove it and"):
        check_servable(tmp_path / "models", said.append)

"""A repository is served by a real tritonserver, or refused with one clear line; nothing is left behind
either way."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import faiss
import numpy as np
import pytest
from shops import ROOT
from toy_repository import SLOW, allow_toys, publish_toy

from ensemble.errors import PeregrineError, ServerError
from ensemble.server import installation as server_folder
from ensemble.server.calls import is_model_ready
from ensemble.server.installation import FeatureLevel, Installation
from ensemble.server.options import ServeOptions
from ensemble.server.process import Launch, command_line
from ensemble.server.running import CLAIM, LIST, Claim, RunningServer, running_server, running_servers
from ensemble.server.state import default_state, make_private
from ensemble.server.supervisor import serve

_TGKILL = 234  # the system call that signals one thread
TOYS_TOO = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
from ensemble.release import foreign
foreign._is_ours = lambda text: True
import peregrine
peregrine.main()
"""


@pytest.fixture
def own_traces():
    """Lists this process's traces since the test began: servers of other tests may still run in it."""
    before = set(traces(os.getpid()))
    return lambda: set(traces(os.getpid())) - before


@pytest.fixture(autouse=True)
def toys(monkeypatch) -> None:
    allow_toys(monkeypatch)


@pytest.fixture
def repository(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    return tmp_path / "models"


def ask(url: str, users=("a", "b")) -> list[str]:
    """The release that answered each user, through raw tritonclient."""
    from tritonclient.grpc import InferenceServerClient, InferInput

    tensor = InferInput("user_id", [len(users), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[user.encode()] for user in users], dtype=object))
    with InferenceServerClient(url) as client:
        answer = client.infer("recommend", [tensor])
    assert answer.as_numpy("item_ids").tolist() == [[b"item1", b"item2", b"item3"]] * len(users)
    return [name.decode() for name in answer.as_numpy("release")[:, 0]]


def peregrine(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", TOYS_TOO, str(ROOT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def eventually(check, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime if path.exists() else 0.0


def traces(pid: int) -> list[Path]:
    """Lists state folders and shared memory of the supervising process `pid`."""
    states = Path(os.environ["XDG_STATE_HOME"]).glob(f"peregrine/*/{CLAIM}")
    return [
        *server_folder.SHM.glob(f"{server_folder._SHM_PREFIX}{pid}_*"),
        *(path.parent for path in states if f'"pid": {pid},' in path.read_text()),
    ]


# -- refusals: no server needed
# ------------------------------------------------------------------------------------


def refused(*arguments: str, env: dict[str, str] | None = None) -> str:
    process = peregrine("serve", "--port", "0", "--metrics-port", "0", *arguments, env=env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.triton
def test_missing_repository_is_one_line_and_exit_code_2(tmp_path):
    assert (
        f"repository {tmp_path / 'none'} does not exist; `peregrine build SHOP --activate` makes one"
        in refused("-r", str(tmp_path / "none"))
    )


@pytest.mark.triton
@pytest.mark.skipif(os.geteuid() != 0, reason="wants to be root")
def test_root_is_refused_until_it_says_so(tmp_path):
    line = refused("-r", str(tmp_path), env={**os.environ, "PEREGRINE_AS_ROOT": "0"})
    assert line.startswith("error: serve does not run as root: every local user can read")
    assert "--as-root" in line


def test_no_active_release_says_how_to_activate_one(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path)
    assert "no release is active" in (line := refused("-r", str(tmp_path / "models")))
    assert "`peregrine release activate NAME` (there are: r1)" in line


@pytest.mark.triton
def test_half_a_release_is_refused(repository):
    (repository / "r1" / "manifest.json").unlink()
    assert "release r1 is incomplete" in refused("-r", str(repository))


@pytest.mark.triton
def test_a_changed_file_is_refused_by_name(repository):
    path = repository / "r1" / "padding.bin"
    path.write_bytes(b"\2" + path.read_bytes()[1:])
    assert "sha256 mismatch r1/padding.bin" in refused("-r", str(repository))


@pytest.mark.triton
def test_a_missing_member_file_is_refused_by_name(repository):
    (repository / "r1_ranker" / "1" / "model.py").unlink()
    assert "r1_ranker/1/model.py" in refused("-r", str(repository))


@pytest.mark.triton
def test_a_taken_port_is_refused_by_number(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used: Address already in use" in refused(
            "-r", str(repository), "--port", str(port)
        )


@pytest.mark.triton
@pytest.mark.skipif(
    bool(os.environ.get("TRITON_SERVER_VERSION")), reason="the image's tritonserver may listen anywhere"
)
def test_an_open_address_is_refused_below_2_72(repository):
    assert "address 0.0.0.0 refused: tritonserver 2.51" in refused(
        "-r", str(repository), "--address", "0.0.0.0"
    )


def test_an_index_that_cannot_be_searched_there_is_refused(repository):
    assert "--index tpu: is unknown; use cpu or gpu" in refused("-r", str(repository), "--index", "tpu")
    if not hasattr(faiss, "StandardGpuResources"):
        assert "--index gpu: faiss-gpu or the GPU is missing" in refused(
            "-r", str(repository), "--index", "gpu"
        )


def test_missing_tritonserver_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ServerError, match=r"tritonserver not found: .*pip install 'peregrine-recommender\[triton\]'"
    ):
        server_folder.find_tritonserver()


def test_tritonserver_on_path_is_preferred_and_its_version_read(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tritonserver").touch(mode=0o755)
    (tmp_path / "TRITON_VERSION").write_text("2.73.0\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = server_folder.find_tritonserver()
    assert found.binary == tmp_path / "bin/tritonserver"
    assert found.level == FeatureLevel(2, 73)
    assert found.level.may_leave_loopback


def test_feature_levels():
    assert not FeatureLevel(2, 51).may_leave_loopback
    assert FeatureLevel(3, 0).may_leave_loopback


def test_flags_close_what_is_not_needed(tmp_path):
    run = server_folder.RunFolder(tmp_path, "prefix")
    line = command_line(
        Installation(Path("/x/tritonserver"), Path("/x"), None),
        run,
        Launch(tmp_path, ServeOptions(metrics_port=None), secret="s"),
    )
    for flag in (
        "--allow-http=false",
        "--grpc-address=127.0.0.1",
        "--model-control-mode=explicit",
        "--load-model=recommend",
        "--allow-metrics=false",
    ):
        assert flag in line
    assert (
        "--grpc-restricted-protocol=shared-memory,model-repository,model-config,statistics,trace,logging:peregrine=s"
        in line
    )


def test_server_file_is_private_and_one_per_state_folder(tmp_path):
    state, repository = tmp_path / "state", tmp_path / "models"
    repository.mkdir()
    claim = Claim(state, repository)
    claim.write(RunningServer(os.getpid(), "127.0.0.1:1", None, "h", "s"))
    assert stat.S_IMODE((state / CLAIM).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert running_server(repository).headers == {"h": "s"}
    with pytest.raises(ServerError, match=rf"served already by process {os.getpid()} at 127\.0\.0\.1:1"):
        Claim(state, repository)
    other = Claim(tmp_path / "other", repository)
    other.write(RunningServer(os.getpid(), "127.0.0.1:2", None, "h", "s"))
    assert [server.url for server in running_servers(repository)] == ["127.0.0.1:1", "127.0.0.1:2"]
    shutil.rmtree(repository / LIST)  # nobody may write there
    assert [server.url for server in running_servers(repository)] == ["127.0.0.1:1", "127.0.0.1:2"]
    claim.drop()
    other.drop()
    assert running_server(repository) is None
    assert [*tmp_path.iterdir()] == [repository]


def test_a_killed_servers_claim_counts_for_nothing(tmp_path):
    state, repository = tmp_path / "state", tmp_path / "models"
    repository.mkdir()
    claim = Claim(state, repository)
    claim.write(RunningServer(1, "x:1", None, "h", "s"))
    os.close(claim._descriptor)
    assert running_servers(repository) == []
    shutil.rmtree(state)
    assert running_servers(repository) == []
    assert [*(repository / LIST).iterdir()] == []
    Claim(state, repository).drop()


def test_folders_of_a_user_without_a_home_are_in_tmp_and_nobody_elses(tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = default_state(tmp_path / "models")
    assert state.parent == tmp_path / f"peregrine-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir()
    state.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServerError, match="is another user's; name another with --state"):
        make_private(state)
    state.parent.unlink()
    make_private(state)
    assert stat.S_IMODE(state.parent.stat().st_mode) == stat.S_IMODE(state.stat().st_mode) == 0o700


# -- a real server
# -------------------------------------------------------------------------------------------------


@pytest.mark.triton
def test_serve_answers_and_leaves_nothing_behind(repository, own_traces):
    with serve(repository, ServeOptions(port=0, metrics_port=0)) as server:
        assert ask(server.url) == ["r1", "r1"]
        assert running_server(repository).url == server.url
        assert {model: len(pids) for model, pids in server.stubs().items()} == {
            f"r1_{name}": 2 for name in ("features", "user_encoder", "recall", "ranker", "reranking")
        }
        assert b"nv_inference_request_success" in urllib.request.urlopen(server.metrics_url).read()
        resident, proportional = server.memory_bytes()
        assert 50e6 < proportional <= resident
        with (
            pytest.raises(ServerError, match="is served already by process"),
            serve(repository, ServeOptions(port=0, metrics_port=None)),
        ):
            pass
        assert own_traces()
        pids = [server.pid, *(pid for pids in server.stubs().values() for pid in pids)]
    assert not own_traces()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert {path.name for path in repository.iterdir() if path.name.startswith(".")} <= {
        ".lock",
        ".names.json",
    }
    written = {p.name for p in repository.glob("r1_*/1/*")}
    assert written == {"model.py", "__pycache__"}
    assert not any(p.is_dir() for p in repository.glob("r1_*/1/__pycache__")), (
        "a changed version folder is loaded again at the next activation"
    )


@pytest.mark.parametrize("has_bytecode", [True, False])
def test_what_processes_compile_is_kept_where_packages_are_not_compiled(tmp_path, monkeypatch, has_bytecode):
    """As in images, where ten processes that each compiled everything took 2.5 times their usual time."""
    monkeypatch.setattr(server_folder, "_has_bytecode", lambda: has_bytecode)
    server_folder.make_run_folder(server_folder.find_tritonserver(), tmp_path)
    run = "import triton_python_backend_utils, ensemble.errors; print(ensemble.errors.__cached__)"
    backend = tmp_path / "backends" / "python"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=backend, capture_output=True, text=True, check=True
    )
    kept = Path(done.stdout.strip())
    assert kept.is_relative_to(tmp_path / "bytecode") != has_bytecode
    assert has_bytecode or kept.exists()


@pytest.mark.triton
def test_control_calls_need_the_secret(repository):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with (
        serve(repository, ServeOptions(port=0, metrics_port=None)) as server,
        InferenceServerClient(server.url) as client,
    ):
        for call in (
            client.get_model_repository_index,
            client.get_inference_statistics,
            lambda **kw: client.unload_model("recommend", **kw),
        ):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                call()
        assert client.get_model_config("r1_recommend", headers=server.headers).config.platform == "ensemble"
        assert ask(server.url) == ["r1", "r1"]


@pytest.mark.triton
def test_a_release_that_cannot_start_is_told_with_its_reason(tmp_path, own_traces):
    publish_toy(
        tmp_path / "models", "r1", tmp_path, broken="raise ValueError('no such planet')", activate=True
    )
    with (
        pytest.raises(ServerError, match="no such planet"),
        serve(tmp_path / "models", ServeOptions(port=0, metrics_port=None)),
    ):
        pass
    assert not own_traces()
    assert running_server(tmp_path / "models") is None


@pytest.mark.alone  # Other servers' folders would be taken for those that are left.
@pytest.mark.triton
def test_a_killed_tritonserver_is_replaced(repository, own_traces):
    said: list[str] = []
    environments = set(Path("/tmp").glob("python_env_*"))
    with serve(repository, ServeOptions(port=0, metrics_port=None), log=said.append) as server:
        first = server.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: server.pid != first and is_model_ready(server.url, "recommend"))
        assert ask(server.url) == ["r1", "r1"]
        assert ask(server.url) == ["r1", "r1"]
    assert not [path for path in set(Path("/tmp").glob("python_env_*")) - environments if _age_s(path) > 5], (
        "Triton's folder of a killed server is left"
    )
    assert any("tritonserver died (signal 9); starting it again" in line for line in said)
    assert not own_traces()


@pytest.mark.triton
def test_sigterm_answers_what_is_in_flight_and_exits_with_0(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path, broken=SLOW, activate=True)
    process = peregrine("serve", "-r", str(repository), "--port", "0", "--metrics-port", "0")
    greeting = [process.stdout.readline() for _ in range(10)]
    assert greeting[0].startswith("serving release r1 of ")
    assert greeting[7].split()[:3] == ["faster", "with", "--fused:"]
    assert greeting[8].split() == ["try", "peregrine", "recommend", "u1", "--repository", str(repository)]
    url = running_server(repository).url
    calls: list[tuple[float, str]] = []  # when it was sent, what became of it

    def keep_asking() -> None:
        result = ""
        while not result:
            sent = time.monotonic()
            try:
                assert ask(url) == ["r1", "r1"]
            except Exception as error:
                result = str(error)
            calls.append((sent, result))

    threads = [threading.Thread(target=keep_asking) for _ in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(calls) > 30)
    signalled = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    for thread in threads:
        thread.join()
    assert process.returncode == 0, err
    assert [result for sent, result in calls if sent < signalled - 0.05 and result] == []
    # the others were turned away at the door, in one of Triton's two ways; none failed inside the ensemble
    door = ("UNAVAILABLE", "Request for unknown model: 'recommend' has no available versions")
    assert all(
        any(words in result for words in door) and "in ensemble" not in result
        for _, result in calls
        if result
    ), calls
    assert traces(process.pid) == []
    assert running_server(repository) is None


@pytest.mark.triton
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tgkill's number is x86_64's")
def test_a_signal_that_another_thread_received_ends_it_too(repository):
    """The kernel may give it to any thread; Python's handler runs in the main one, once that is awake."""
    process = peregrine("serve", "-r", str(repository), "--port", "0", "--metrics-port", "0")
    assert process.stdout.readline().startswith("serving release r1 of ")
    time.sleep(1)  # until the main thread waits
    threads = {int(of.name) for of in Path(f"/proc/{process.pid}/task").iterdir()}
    another = min(threads - {process.pid})
    try:
        assert ctypes.CDLL(None).syscall(_TGKILL, process.pid, another, int(signal.SIGTERM)) == 0
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.triton
def test_a_killed_supervisor_takes_tritonserver_along_and_the_next_start_sweeps_the_rest(repository):
    process = peregrine("serve", "-r", str(repository), "--port", "0", "--metrics-port", "0")
    assert process.stdout.readline().startswith("serving")
    url = running_server(repository).url
    process.kill()
    process.wait()
    eventually(lambda: not is_model_ready(url, "recommend"))
    assert traces(process.pid)
    with serve(repository, ServeOptions(port=0, metrics_port=None)) as server:
        assert ask(server.url) == ["r1", "r1"]
        eventually(lambda: traces(process.pid) == [])


def test_errors_of_this_module_are_peregrine_errors():
    assert issubclass(ServerError, PeregrineError)

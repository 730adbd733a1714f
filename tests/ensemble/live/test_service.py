"""The writer as a process, its instances and its clients: nothing acknowledged is lost, and done means that
all have it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_release import RandomRelease, make_release, open_again, write_item_encoder
from shops import ROOT

from clients import items as items_module
from clients.cli import items as items_cli
from clients.errors import InvalidArgument, Overloaded, Unavailable
from clients.items import Changed, ItemClient, read_changes
from ensemble.live import merge_process
from ensemble.live import service as service_module
from ensemble.live.instances import InstanceFile, sequences
from ensemble.live.items import LiveItems
from ensemble.live.keeper import service_process
from ensemble.live.merge_process import MergeProcess
from ensemble.live.service import ItemService
from ensemble.live.writer import ItemWriter
from ensemble.release.files import file_sha256
from ensemble.release.manifest import sealed
from ensemble.release.release import open_release


def test_dead_instances_do_not_hold_a_change_up(tmp_path):
    first, second = InstanceFile(tmp_path), InstanceFile(tmp_path)
    first.publish(3)
    second.publish(5)
    assert sorted(sequences(tmp_path).values()) == [3, 5]
    os.close(first._descriptor)  # as the kernel does for a killed process
    assert list(sequences(tmp_path).values()) == [5]
    second.close()
    assert sequences(tmp_path) == {}


def active(release: RandomRelease) -> RandomRelease:
    """Makes the release one that other processes find: a manifest and an alias."""
    from ensemble import contract

    files = _digests(release.repository)
    text = sealed({"contract": contract.fingerprint(release.schema), "files": files})
    release.manifest = json.loads(text)
    (release.path / "manifest.json").write_text(text)
    (release.repository / "recommend").mkdir()
    (release.repository / "recommend" / "config.pbtxt").write_text('model_name: "r1_recommend"')
    return release


def _digests(repository: Path) -> dict[str, dict]:
    from ensemble.release.files import file_sha256

    return {
        str(p.relative_to(repository)): {"sha256": file_sha256(p)}
        for p in repository.rglob("*")
        if p.is_file()
    }


def start_writer(repository: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ensemble.live.service", str(repository)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ItemClient(repository).close()
            return process
        except Unavailable:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    raise AssertionError("the writer did not start")


def delete_until_it_is_gone(repository: Path, items: range, acknowledged: set[str]) -> None:
    with ItemClient(repository, wait_s=0) as client:
        for i in items:
            client.delete(f"i{i:05}")
            acknowledged.add(f"i{i:05}")
            time.sleep(0.005)
        while True:
            client.status()


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path, rng):
    release = active(make_release(tmp_path, rng))
    acknowledged: set[str] = set()
    homes: list[Path] = []
    for turn in range(2):
        process = start_writer(tmp_path)
        homes.append(Path(json.loads((tmp_path / ".live" / "writer.json").read_text())["socket"]).parent)
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        with pytest.raises(Unavailable):
            delete_until_it_is_gone(tmp_path, range(60 * turn, 60 * turn + 60), acknowledged)
        process.wait()
        process.stdin.close()
        process.stderr.close()
        view, unique = open_again(release).live.view, len(acknowledged)
        gone = {f"i{i:05}" for i in range(120) if view.state.deleted[1 + i]}
        assert acknowledged <= gone
        assert len(gone) <= unique + 2, "at most the ones in flight"
    assert not homes[0].exists(), "what the killed one left is swept by the next"
    shutil.rmtree(homes[1])


@pytest.mark.alone
def test_a_change_is_recallable_in_under_a_second_and_done_when_all_have_it(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    active(release)
    service = ItemService(tmp_path, lambda line: None)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    followers = [LiveItems(open_again(release)) for _ in range(3)]
    for follower in followers:
        follower.follow()
    deadline = time.monotonic() + 5
    while not (tmp_path / ".live" / "writer.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with ItemClient(tmp_path, wait_s=5.0) as client:
            client.status()
            while len(client.status().instances) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            client.add({"item_id": "first", "brand": "brand1"})  # opens the engine
            started = time.monotonic()
            done = client.add({"item_id": "n1", "brand": "brand1", "price": 3})
            assert time.monotonic() - started < 1.0
            assert done.done
            assert list(done.instances.values()) == [2, 2, 2]
            assert all(follower.view.rows_from_ids(np.array([b"n1"]))[0] == 122 for follower in followers)
            with pytest.raises(InvalidArgument, match=r"^item 'n1' exists already; update it instead$"):
                client.add({"item_id": "n1"})
            client.merge()
            while client.status().generation == 0 and time.monotonic() < deadline + 30:
                time.sleep(0.02)
            assert client.status().unmerged == 0
            assert client.delete("n1").done
            assert all(follower.view.state.generation == 1 for follower in followers)
    finally:
        for follower in followers:
            follower.close()
        service.stop()
        thread.join()


def test_without_a_writer_the_client_says_how_to_start_one(tmp_path):
    with pytest.raises(
        Unavailable,
        match=r"^nobody writes the items of .*; start `peregrine serve`, or `peregrine items serve`$",
    ):
        ItemClient(tmp_path)


def test_a_file_of_items_is_one_item_a_line_whatever_its_texts_hold(tmp_path):
    (tmp_path / "items").write_text(
        '{"item_id": "a", "brand": "x\u2028y"}\n\n7\n{"item_id": \n', encoding="utf-8", newline="\r\n"
    )
    lines = items_cli._lines(tmp_path / "items")
    assert read_changes(lines[:3], "upsert", "items") == [
        {"op": "upsert", "item": {"item_id": "a", "brand": "x\u2028y"}},
        {"op": "upsert", "item": {"item_id": 7}},
    ]
    with pytest.raises(InvalidArgument, match=r"^items, line 4: not JSON: "):
        read_changes(lines, "upsert", "items")


def test_a_long_file_says_how_far_it_came(tmp_path, monkeypatch, capsys):
    class Client:
        def __init__(self, *_):
            self.parts = []

        def apply(self, part):
            self.parts.append(part)
            if len(self.parts) == 2:
                raise InvalidArgument("item 'x' is unknown")
            return Changed(1, True, "r1", unknown_values={"brand": ["Vert"]})

    monkeypatch.setattr(items_module, "AT_ONCE", 2)
    changes = [{"op": "delete", "item": {"item_id": str(n)}} for n in range(5)]
    with pytest.raises(
        InvalidArgument,
        match=r"^item 'x' is unknown \(the first 2 changes were made before it: send those after them again",
    ):
        items_cli._apply(Client(), changes)
    client = Client()
    items_cli._name_unknown(items_cli._apply(client, changes[:2]))
    assert "release r1 does not know brand 'Vert': filters find it" in capsys.readouterr().err
    assert client.parts == [changes[:2]]


def sleeping(*_: str, **options: object) -> subprocess.Popen:
    """Stands in for a merge that takes long."""
    return subprocess.Popen(["sleep", "60"], **options)


def test_a_merge_without_idle_time_is_let_run_after_a_while(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(merge_process, "module_process", sleeping)
    merging = MergeProcess(ItemWriter(make_release(tmp_path, rng)).overlay)
    assert merging.generation() is None
    assert os.sched_getscheduler(merging._process.pid) == os.SCHED_IDLE
    merging._idle_until_s = time.monotonic() - 1
    assert merging.generation() is None
    pid = merging._process.pid  # the same one, or, for an ordinary user, another
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    merging.stop()
    assert not Path(f"/proc/{pid}").exists()


def add_release(repository: Path, rng: np.random.Generator, name: str) -> None:
    """Puts another release beside r1."""
    from ensemble import contract

    release = make_release(repository / "elsewhere", rng)
    fingerprint = contract.fingerprint(release.schema)
    release.path.rename(repository / name)
    files = {
        str(path.relative_to(repository)): {"sha256": file_sha256(path)}
        for path in (repository / name).iterdir()
    }
    manifest = sealed({"contract": fingerprint, "files": files})
    (repository / name / "manifest.json").write_text(manifest)


def test_a_merge_that_ends_after_an_activation_harms_no_release(tmp_path, rng, monkeypatch):
    """It is one release's: the next one's overlay has all changes of before and after, and its own merge."""
    active(make_release(tmp_path, rng))
    add_release(tmp_path, rng, "r2")
    log: list[str] = []
    service = ItemService(tmp_path, log.append)
    client = started(service)
    client.delete("i00001", "i00002")
    with monkeypatch.context() as patch:
        patch.setattr(merge_process, "module_process", sleeping)
        client.merge()
        merging = service._merging
        assert merging is not None
    (tmp_path / "recommend" / "config.pbtxt").write_text('model_name: "r2_recommend"')
    client.delete("i00003", "i00004", "i00005")
    wait_until(lambda: service._merging is None)
    assert not Path(f"/proc/{merging._process.pid}").exists(), "the other release's merge is given up"
    client.merge()
    wait_until(lambda: service._merging is None)
    status = client.status()
    assert (status.release, status.generation, status.unmerged) == ("r2", 1, 0)
    service.stop()
    assert LiveItems(open_release(tmp_path, "r2")).view.num_deleted == 5, log
    ItemWriter(open_release(tmp_path, "r1")).close()
    assert LiveItems(open_release(tmp_path, "r1")).view.num_deleted == 5, "going back keeps every change"


def test_a_release_is_made_ready_before_it_is_loaded_and_kept_so_while_it_is(tmp_path, rng):
    active(make_release(tmp_path, rng))
    add_release(tmp_path, rng, "r2")
    service = ItemService(tmp_path, lambda line: None)
    client = started(service)
    client.delete("i00001")
    client.prepare("r2")
    assert LiveItems(open_release(tmp_path, "r2")).view.num_deleted == 1
    loaded = LiveItems(open_release(tmp_path, "r2"))
    loaded.follow()
    service._loaded._expected_until_s.clear()
    wait_until(lambda: len(client.status().instances) == 1)
    client.wait_s = 5
    assert client.delete("i00002").done
    assert loaded.view.num_deleted == 2
    loaded.close()
    wait_until(lambda: len(service._writer.overlays) == 1)
    client.delete("i00003")
    assert LiveItems(open_release(tmp_path, "r2")).view.num_deleted == 2, "nobody has loaded it any more"
    service.stop()


def started(service: ItemService) -> ItemClient:
    """Runs the service in a thread; gives a client of it."""
    threading.Thread(target=service.run, daemon=True).start()
    wait_until((service.folder / "writer.json").exists)
    return ItemClient(service.repository, wait_s=0)


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_whatever_a_merge_raises_the_writer_goes_on(tmp_path, rng, monkeypatch):
    active(make_release(tmp_path, rng))
    log: list[str] = []
    service = ItemService(tmp_path, log.append, merge_at=0)

    def refused(*_: object) -> None:
        raise PermissionError("not by this user")

    monkeypatch.setattr(service_module, "MergeProcess", refused)
    client = started(service)
    client.delete("i00001")
    wait_until(lambda: log)
    client.delete("i00003")
    assert client.status().sequence >= 2
    assert "not by this user" in log[0]
    assert "tried again in 2 s" in log[0]
    assert len(log) < 3, "not at every turn"
    service.stop()


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
def test_a_writer_that_is_killed_or_stopped_is_replaced_and_said(tmp_path, rng, harm):
    active(make_release(tmp_path, rng))
    log: list[str] = []

    def writer_pid() -> int:
        path = tmp_path / ".live" / "writer.json"
        return json.loads(path.read_text())["pid"] if path.exists() else 0

    with service_process(tmp_path, log.append):
        wait_until(writer_pid)
        first = writer_pid()
        ItemClient(tmp_path, wait_s=0).delete("i00001")
        os.kill(first, harm)
        wait_until(lambda: writer_pid() not in (0, first))
        wait_until(lambda: log)
        assert ItemClient(tmp_path, wait_s=0).status().sequence == 1, "what was acknowledged is there"
        second = writer_pid()
    assert "SIGKILL" in log[0]
    assert not Path(f"/proc/{second}").exists()


def test_too_many_changes_that_wait_are_refused_and_taken_later(tmp_path, rng, monkeypatch):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    active(release)
    service = ItemService(tmp_path, lambda line: None, merge_at=2)
    service.most_waiting = 4
    with monkeypatch.context() as patch:
        patch.setattr(merge_process, "module_process", sleeping)
        client = started(service)
        client.upsert(*({"item_id": f"new{n}"} for n in range(4)))
        wait_until(lambda: service._merging is not None)
        with pytest.raises(
            Overloaded,
            match=r"^4 changes wait to be merged into the index, and no more are taken before; send these",
        ) as caught:
            client.upsert({"item_id": "refused"})
        assert caught.value.retryable
        assert client.status().sequence == 4, "whoever changes nothing is answered"
    merging = service._merging
    merging._process.kill()  # it is begun again, after a pause
    monkeypatch.setattr(items_cli, "_FIRST_PAUSE_S", 0.05)
    changes = [{"op": "upsert", "item": {"item_id": "refused"}}]
    assert items_cli._apply(client, changes).sequence == 5, "it is sent again until there is room"
    service.stop()


# Its merge is forked: `nobody` may not read a Python that is installed for root.
WHOLE_LIFE = """\
import mmap, os, sys, threading, time
from pathlib import Path
import onnxruntime
from clients.items import ItemClient
from ensemble.live import merge, merge_process
from ensemble.live.service import ItemService
from ensemble.release.release import open_release

class Forked:
    def __init__(self, _module, repository, name, sequence, _home, **_):
        self.returncode, (self.read, write) = None, os.pipe()
        self.pid = os.fork()
        if not self.pid:
            number = merge.merge(open_release(Path(repository), name), int(sequence))
            os.write(write, str(number).encode())
            os._exit(0)
        os.close(write)

    def poll(self):
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = ended[1]
        return self.returncode

    def communicate(self):
        return os.read(self.read, 100).decode(), ""

merge.faiss.omp_set_num_threads(1)
merge_process.module_process = Forked
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert "CapEff:\\t0000000000000000" in Path("/proc/self/status").read_text()
for turn in range(2):
    service = ItemService(Path(sys.argv[1]), print)
    threading.Thread(target=service.run, daemon=True).start()
    while not (service.folder / "writer.json").exists():
        time.sleep(0.02)
    with ItemClient(sys.argv[1], wait_s=0) as client:
        client.upsert({"item_id": f"new{turn}", "brand": "Vert"}, {"item_id": "i00003", "price": 3})
        client.delete(f"i0001{turn}")
        client.merge()
        while client.status().unmerged:
            time.sleep(0.05)
        assert client.compact().log_lines == client.status().log_items
        assert client.status().sequence == 3 * (turn + 1)
    service.stop()
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_user_without_any_right_can_write_items(rng):
    assert run_as_nobody(rng, WHOLE_LIFE) == (
        "items: generation 1 of r1 holds all changes up to 3\n"
        "items: 0 lines were dropped from {log}\n"
        "items: generation 2 of r1 holds all changes up to 6\n"
        "items: 1 lines were dropped from {log}\ndone\n"
    )


# What an ordinary user may do, tried by root as well: as `nobody` from the moment that all is imported.
ORDINARY_USER = """\
import mmap, os, subprocess, sys, time
from pathlib import Path
from ensemble.live import merge_process
from ensemble.live.service import ItemService

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
merge_process.module_process = lambda *module, **options: subprocess.Popen(["sleep", "60"], **options)
service = ItemService(Path(sys.argv[1]), print)

def merging():
    process = service._merging._process
    return process.pid, os.sched_getscheduler(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid)

service._start_merge(service._opened().overlay)
first, policy, _ = merging()
service._care()
assert merging()[:2] == (first, os.SCHED_IDLE), merging()
service._merging._idle_until_s = time.monotonic() - 1
service._care()
second, policy, nice = merging()
assert (policy, nice) == (os.SCHED_OTHER, 19), (policy, nice)
assert second == first or not Path(f"/proc/{first}").exists()
service._care()
assert merging()[0] == second, "it is not begun a third time"
service.stop()
print("done")
"""


def test_an_ordinary_users_merge_is_let_run_too(rng):
    assert run_as_nobody(rng, ORDINARY_USER) == "done\n"


def run_as_nobody(rng: np.random.Generator, program: str) -> str:
    """Runs a program that becomes `nobody` where it can, on its own repository; gives what it printed."""
    with tempfile.TemporaryDirectory() as folder:  # where `nobody` may go, unlike tmp_path
        repository = Path(folder) / "repository"
        release = make_release(repository, rng)
        write_item_encoder(release)
        active(release)
        if os.geteuid() == 0:
            for path in (Path(folder), *Path(folder).rglob("*")):
                os.chown(path, 65534, 65534)
        done = subprocess.run(
            [sys.executable, "-c", program, str(repository)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(str(repository / ".live" / "catalogue" / "log"), "{log}")


def test_what_is_wrong_with_one_loaded_release_is_said_and_harms_no_other(tmp_path, rng):
    active(make_release(tmp_path, rng))
    add_release(tmp_path, rng, "r2")
    log: list[str] = []
    service = ItemService(tmp_path, log.append)
    client = started(service)
    client.delete("i00001")
    manifest = json.loads((tmp_path / "r2" / "manifest.json").read_text())
    manifest["catalogue"] = {"log": service._writer.catalogue.id, "sequence": 9}
    (tmp_path / "r2" / "manifest.json").write_text(sealed(manifest))
    loaded = LiveItems(open_release(tmp_path, "r2"))
    loaded.follow()
    wait_until(lambda: log)
    service._loaded._next_s = 0.0
    client.delete("i00002")
    service._loaded._next_s = 0.0
    client.delete("i00003")
    time.sleep(0.5)
    assert len(log) == 1
    assert "r2 was built from it up to change 9; put the whole log back" in log[0]
    loaded.close()
    service.stop()


def test_the_overlay_of_a_removed_release_goes_and_no_change_with_it(tmp_path, rng):
    active(make_release(tmp_path, rng))
    add_release(tmp_path, rng, "r2")
    log: list[str] = []
    service = ItemService(tmp_path, log.append)
    client = started(service)
    client.delete("i00001")
    client.prepare("r2")
    second = open_release(tmp_path, "r2")
    old = tmp_path / ".live" / f"r0-{second.id}"
    old.mkdir()
    (old / "current").write_text("0\n")
    (old / "log-0").write_bytes(b"peregrine live 1".ljust(400, b"\0"))
    (tmp_path / "r2").rename(tmp_path / "away")  # though it was expected to be loaded
    wait_until(lambda: log)
    client.delete("i00002")
    assert log == [f"items: the overlay {second.live_folder.name} is removed, as its release was"]
    assert not second.live_folder.exists()
    assert old.exists(), "its changes are nowhere else"
    (tmp_path / "away").rename(tmp_path / "r2")
    client.prepare("r2")
    assert LiveItems(open_release(tmp_path, "r2")).view.num_deleted == 2
    service.stop()

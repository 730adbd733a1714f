"""Stages skip what is done, and a disk that fills up costs one line, no traceback and no half-written
folder."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from shops import ROOT

from builders.stages import Stage, Stages
from ensemble.errors import InvalidInput, ReleaseError


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path / "stages", Console(quiet=True))


def test_a_stage_runs_once_for_the_same_options(stages):
    ran = []

    def work(inputs, options, folder, progress):
        ran.append(folder.name)
        np.save(folder / "x.npy", np.zeros(3))

    first, second, third = (
        stages.run(Stage("data", work, 1)),
        stages.run(Stage("data", work, 1)),
        stages.run(Stage("data", work, 2)),
    )
    assert (first.skipped, second.skipped, third.skipped) == (False, True, False)
    assert first.folder == second.folder != third.folder
    assert len(ran) == 2
    assert second.took_s == round(first.took_s, 2), "what a skipped stage took is still known"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"stage index: no space left in .*finished stages are kept",
        ),
        (
            RuntimeError("faiss: write error: 0 != 1 (No space left on device)"),
            r"stage index: no space left in ",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            r"stage index: cannot write /a/b: Permission denied; .*--repository",
        ),
    ],
    ids=["full", "full, says Faiss", "read-only"],
)
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing_half_written(stages, error, told):
    def work(inputs, options, folder, progress):
        (folder / "half").write_text("written")
        raise error

    with pytest.raises(ReleaseError, match=told):
        stages.run(Stage("index", work))
    assert list(stages.root.iterdir()) == []


def test_any_other_error_is_not_dressed_up(stages):
    def work(inputs, options, folder, progress):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        stages.run(Stage("index", work))


def test_a_stage_gets_the_folders_it_reads_by_name_and_no_others(stages, tmp_path):
    stages.give("shop", tmp_path / "shop", "content")
    stages.run(Stage("data", lambda *to: None, None, ("shop",)))
    read: dict[str, Path] = {}
    stages.run(Stage("index", lambda inputs, *to: read.update(inputs), None, ("data",)))
    assert read == {"data": stages.done[0].folder}


def test_another_content_of_what_is_given_is_another_key(stages, tmp_path):
    keys = set()
    for content in (1, 2, 1):
        stages.give("shop", tmp_path, content)
        keys.add(stages.run(Stage("data", lambda *to: None, None, ("shop",))).key)
    assert len(keys) == 2


# --- two builds at once


def slow(log: Path, began: threading.Event | None = None) -> Stage:
    """A stage that writes two files, a while apart, and a line into `log`."""

    def work(inputs, options, folder, progress):
        with log.open("a") as file:
            file.write(f"{threading.current_thread().name}\n")
        (folder / "a").write_text(threading.current_thread().name)
        if began:
            began.set()
        time.sleep(0.5)
        (folder / "b").write_text(threading.current_thread().name)

    return Stage("data", work, {"same": 1})


def test_two_builds_at_once_run_a_stage_once_and_the_second_says_that_it_waits(tmp_path):
    began, log, said = threading.Event(), tmp_path / "log", io.StringIO()
    first = Stages(tmp_path / "stages", Console(file=io.StringIO()))
    second = Stages(tmp_path / "stages", Console(file=said, width=200))
    thread = threading.Thread(target=lambda: first.run(slow(log, began)), name="first")
    thread.start()
    assert began.wait(10)
    done = second.run(slow(log))
    thread.join()
    assert log.read_text().split() == ["first"]
    assert done.skipped
    assert {path.name: path.read_text() for path in done.folder.iterdir()} == {"a": "first", "b": "first"}
    assert said.getvalue() == "stage data: another build is at work on it; waiting until it is done\n"
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {done.folder.name, "seconds.json"}


def test_many_builds_at_once_run_a_stage_once(tmp_path):
    log = tmp_path / "log"

    def build():
        Stages(tmp_path / "stages", Console(quiet=True)).run(slow(log))

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.read_text().splitlines()) == 1


def test_a_build_whose_companion_fails_runs_the_stage_itself(tmp_path):
    began, log = threading.Event(), tmp_path / "log"

    def fail(inputs, options, folder, progress):
        began.set()
        time.sleep(0.3)
        raise InvalidInput("no")

    def failing():
        with pytest.raises(InvalidInput):
            Stages(tmp_path / "stages", Console(quiet=True)).run(Stage("data", fail, {"same": 1}))

    thread = threading.Thread(target=failing)
    thread.start()
    assert began.wait(10)
    done = Stages(tmp_path / "stages", Console(quiet=True)).run(slow(log))
    thread.join()
    assert not done.skipped
    assert (done.folder / "b").exists()


KILLED = """\
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rich.console import Console
from builders.stages import Stage, Stages
def work(inputs, options, folder, progress):
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
Stages(Path(sys.argv[2]), Console(quiet=True)).run(Stage("data", work))
"""


def test_a_killed_build_leaves_no_lock(stages):
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(stages.root)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.suffix for path in sorted(stages.root.iterdir())] == [".lock", ".partial"]

    def work(inputs, options, folder, progress):
        assert list(folder.iterdir()) == []

    done = stages.run(Stage("data", work))
    assert {path.name for path in stages.root.iterdir()} == {done.folder.name, "seconds.json"}

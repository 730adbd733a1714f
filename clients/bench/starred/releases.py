"""Turns a server at work to and fro between releases, and offers it releases that must not be served."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from clients.bench.starred.load import Row
from clients.bench.starred.setting import (
    ANOTHER_TASTE,
    BAD,
    RANKER,
    SECOND,
    Edit,
    Setting,
    copy_release,
    edit_ranker,
)
from clients.operations.push import push
from clients.operations.releases import activate
from clients.operations.store import Store
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release.names import release_names
from ensemble.release.release import Release, open_release
from ensemble.server.calls import is_model_ready

_SWAPS, _ALL_SWAPS = 4, 50
_MUTATIONS, _ALL_MUTATIONS = 10, 200
_KILLS, _ALL_KILLS = 5, 20
_LOOK_EVERY_S, _REFUSED_WITHIN_S = 0.05, 20.0
_PULL = """\
import sys
from pathlib import Path
from clients.operations.pull import pull
from clients.operations.store import Store
print("begins", flush=True)
pull(Path(sys.argv[1]), Store(sys.argv[2]), [sys.argv[3]])
"""


def swap(setting: Setting) -> list[Row]:
    """Turns the server to a second release and back, again and again."""
    first, bench = setting.release, setting.bench
    copy_release(first, setting.repository, SECOND, *ANOTHER_TASTE)
    activate(setting.repository, SECOND, force=True)
    bench.learn_lists(setting.server.url)
    activate(setting.repository, first.name, force=True)
    took = list[float]()

    def harm() -> None:
        for turn in range(_ALL_SWAPS if setting.is_all else _SWAPS):
            began = time.monotonic()
            activate(setting.repository, first.name if turn % 2 else SECOND, force=True)
            took.append(time.monotonic() - began)

    with _readiness(setting.server.url) as unready:
        notes, began = bench.run(harm)
    row = bench.row("swap", notes, began, setting.bench.harmed)
    answered = {answer.release for *_, answer, _ in notes if answer is not None}
    row["swaps"], row["slowest_swap_s"], row["unready"] = len(took), round(max(took), 1), len(unready)
    row["faults"] = [f"not ready {len(unready)} times"] if unready else []
    row["faults"] += [] if answered >= {first.name, SECOND} else ["only one release answered"]
    row["more"] = f"{len(took)} swaps, slowest {row['slowest_swap_s']} s"
    return [row]


@contextlib.contextmanager
def _readiness(url: str) -> Iterator[list[float]]:
    """Asks again and again whether `recommend` is ready; gives the times at which it was not."""
    unready, end = list[float](), threading.Event()

    def look() -> None:
        while not end.wait(_LOOK_EVERY_S):
            if not is_model_ready(url, "recommend"):
                unready.append(time.monotonic())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield unready
    finally:
        end.set()
        thread.join()


def corrupt(setting: Setting) -> list[Row]:
    """Offers a release of which one file has changed: a bit, a stretch of zeros, a cut, another file's
    content."""
    release = copy_release(setting.release, setting.repository, SECOND, *ANOTHER_TASTE)
    kinds = [f"{SECOND}_{RANKER}/1/model.onnx", f"{SECOND}/index.faiss", f"{SECOND}/items.npy"]
    kinds += [f"{SECOND}_{RANKER}/config.pbtxt", f"{SECOND}_{RANKER}/1/model.plan"]
    kinds = [kind for kind in kinds if kind in release.manifest["files"]]
    count, rng = _ALL_MUTATIONS if setting.is_all else _MUTATIONS, random.Random(0)
    changes = [(kind, number) for kind in kinds for number in range(count)]
    let_in = list[str]()

    def harm() -> None:
        for kind, number in changes:
            path = setting.repository / kind
            whole = path.read_bytes()
            path.write_bytes(_changed(whole, number % 4, rng, setting.repository / f"{SECOND}/schema.json"))
            if f"sha256 mismatch {kind}" not in _refusal(setting, SECOND):
                let_in.append(kind)
            path.write_bytes(whole)

    notes, began = setting.bench.run(harm)
    row = setting.bench.row("corrupt", notes, began, setting.bench.harmed)
    return [_refusals(row, len(changes), let_in)]


def _changed(whole: bytes, how: int, rng: random.Random, other: Path) -> bytes:
    """Changes a file's bytes in one of four ways."""
    at = rng.randrange(len(whole))
    if how == 0:
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
    if how == 1:
        zeroed = whole[:at] + bytes(min(4096, len(whole) - at)) + whole[at + 4096 :]
        return zeroed if zeroed != whole else bytes(len(whole))
    return whole[:at] if how == 2 else other.read_bytes()


def _refusal(setting: Setting, name: str) -> str:
    """Gives why a release is not activated; empty if it was."""
    try:
        activate(setting.repository, name, force=True)
    except PeregrineError as error:
        return str(error)
    return ""


def _refusals(row: Row, count: int, let_in: list[str]) -> Row:
    """Adds to a row how many of what had to be refused were."""
    row["refused"], row["offered_releases"] = count - len(let_in), count
    row["faults"] = [f"not refused: {one}" for one in sorted(set(let_in))]
    row["more"] = f"refused {row['refused']} of {count}"
    return row


def half(setting: Setting) -> list[Row]:
    """Leaves parts of a release where it would be, and kills those who bring one at any moment."""
    first, repository = setting.release, setting.repository
    origin = setting.folder / "origin"
    source = copy_release(first, origin, SECOND, *ANOTHER_TASTE)
    store = setting.folder / "store"
    push(origin, Store(str(store)), [SECOND])
    let_in, kills = list[str](), _ALL_KILLS if setting.is_all else _KILLS

    def harm() -> None:
        for part, make in _PARTS.items():
            make(source, repository)
            if not _refusal(setting, SECOND):
                let_in.append(part)
            _remove(repository, SECOND)
        whole_s, rng = _pull(repository, store), random.Random(0)
        for _ in range(kills):
            _remove(repository, SECOND)
            _pull(repository, store, rng.uniform(0, whole_s))
            if not _is_none_or_whole(repository):
                let_in.append("a killed pull")
        _pull(repository, store)
        activate(repository, SECOND, force=True)

    notes, began = setting.bench.run(harm)
    setting.bench.learn_lists(setting.server.url)
    row = _refusals(
        setting.bench.row("half", notes, began, setting.bench.harmed), len(_PARTS) + kills, let_in
    )
    if left := [path.name for path in repository.glob(".pull-*")]:
        row["faults"].append(f"left behind: {', '.join(left)}")
    return [row]


def _folder_only(source: Release, repository: Path) -> None:
    (repository / f"{SECOND}_{RANKER}" / "1").mkdir(parents=True)


def _configuration_only(source: Release, repository: Path) -> None:
    _folder_only(source, repository)
    place = f"{SECOND}_{RANKER}/config.pbtxt"
    shutil.copy(source.repository / place, repository / place)


def _no_manifest(source: Release, repository: Path) -> None:
    for folder in source.repository.glob(f"{SECOND}*"):
        shutil.copytree(folder, repository / folder.name)
    (repository / SECOND / "manifest.json").unlink()


def _growing_file(source: Release, repository: Path) -> None:
    for folder in source.repository.glob(f"{SECOND}*"):
        shutil.copytree(folder, repository / folder.name)
    path = repository / f"{SECOND}_{RANKER}" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_PARTS: dict[str, Callable[[Release, Path], None]] = {
    "a folder": _folder_only,
    "a configuration": _configuration_only,
    "all but the manifest": _no_manifest,
    "a file that grows": _growing_file,
}


def _remove(repository: Path, name: str) -> None:
    """Removes what there is of a release that nobody serves."""
    for folder in (repository / name, *repository.glob(f"{name}_*")):
        shutil.rmtree(folder, ignore_errors=True)


def _pull(repository: Path, store: Path, kill_after_s: float | None = None) -> float:
    """Pulls the second release in a process of its own, which is killed after a while; gives how long the
    pull itself took."""
    command = [sys.executable, "-c", _PULL, str(repository), str(store), SECOND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise ReleaseError(f"pull failed: {said[-300:]}")
        return time.monotonic() - began


def _is_none_or_whole(repository: Path) -> bool:
    """Says whether the second release is not there, or all that its manifest says."""
    if SECOND not in release_names(repository):
        return True
    try:
        open_release(repository, SECOND).verify()
    except ReleaseError:
        return False
    return True


def bad(setting: Setting) -> list[Row]:
    """Offers releases that are whole and wrong: with code of their own, with scores that are none."""
    source, server = setting.release, setting.server
    let_in, reasons, slowest, first = list[str](), list[str](), 0.0, server.pid

    def harm() -> None:
        nonlocal slowest
        for what, edit in _FAULTS.items():
            copy_release(source, setting.repository, BAD, edit)
            began = time.monotonic()
            reason = _refusal(setting, BAD)
            reasons.append(f"{what}: {reason[:200]}")
            if not reason:
                let_in.append(what)
                activate(setting.repository, source.name, force=True)
            slowest = max(slowest, time.monotonic() - began)
            _remove(setting.repository, BAD)

    notes, began = setting.bench.run(harm)
    row = _refusals(setting.bench.row("bad", notes, began, setting.bench.harmed), len(_FAULTS), let_in)
    row["slowest_refusal_s"], row["reasons"] = round(slowest, 1), reasons
    row["faults"] += [] if server.pid == first else ["tritonserver was started again"]
    row["faults"] += [] if slowest <= _REFUSED_WITHIN_S else [f"refused after {slowest:.0f} s"]
    row["more"] += f", slowest {slowest:.1f} s"
    return [row]


def _with_code(body: str) -> Edit:
    """Makes an edit that gives the ranker code of its own."""
    text = f"import os, time\nclass TritonPythonModel:\n    def initialize(self, args):\n        {body}\n"
    text += "    def execute(self, requests):\n        return None\n"

    def edit(target: Path, name: str) -> None:
        (target / f"{name}_{RANKER}" / "1" / "model.py").write_text(text, encoding="utf-8")

    return edit


def _with_ranker(*operations: tuple[str, float]) -> Edit:
    """Makes an edit of what the ranker gives."""
    return lambda target, name: edit_ranker(target, name, *operations)


_FAULTS: dict[str, Edit] = {
    "its start raises": _with_code("raise ValueError"),
    "its start crashes": _with_code("os.kill(os.getpid(), 11)"),
    "its start ends the process": _with_code("os._exit(1)"),
    "its start takes a minute": _with_code("time.sleep(60)"),
    "it answers with nothing": _with_code("pass"),
    "a width too many": _with_ranker(("Concat", 0.0)),
    "scores that are no numbers": _with_ranker(("Add", float("nan"))),
    "scores all alike": _with_ranker(("Mul", 0.0), ("Add", 0.5)),
    "scores upside down": _with_ranker(("Mul", -1.0), ("Add", 1.0)),
}

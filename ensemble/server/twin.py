"""Asks a release about its own held-out users in a process of its own, before any server loads it.

The twin runs the very steps that will serve, with limits of memory and time: a release that gives nonsense,
hangs, needs too much or crashes is refused here, where it can do no harm.

    python -m ensemble.server.twin REPOSITORY RELEASE    a line when it is open, then one of JSON
"""

from __future__ import annotations

import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from ensemble.contract import PIPELINE, SEARCH
from ensemble.engines import ENGINE_VARIABLE, INDEX_VARIABLE
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release.canary import CANARY, SAME_ENGINE, read_canary
from ensemble.release.release import Release
from ensemble.steps.search_settings import read_search
from ensemble.steps.served import ServedRelease, open_served
from ensemble.tiers.settings import VARIABLE as TIERS_VARIABLE

ASK_S = 8.0  # for a few users, who take milliseconds
# Opening reads and digests every file. A loop that never ends is found by the time of a core that it takes,
# which does not depend on who else is at work here
_CPU_S, _WALL_S, _BYTES_A_S = 12.0, 60.0, 20e6
_MEMORY_BYTES, _MEMORY_SHARE = 2 << 30, 3  # a fixed part, and so many times the release's own size


@dataclass(frozen=True)
class Limits:
    """Holds what a twin may take."""

    open_s: float
    ask_s: float
    cpu_s: float  # of one core, for all of it
    memory_bytes: int  # of private memory: what is mapped from files is shared, and not counted


def limits_of(release: Release) -> Limits:
    """Gives the limits that suit a release's size."""
    size = sum(int(entry["bytes"]) for entry in release.manifest["files"].values())
    reading_s = size / _BYTES_A_S
    return Limits(_WALL_S + reading_s, ASK_S, _CPU_S + reading_s, _MEMORY_BYTES + _MEMORY_SHARE * size)


def ask_twin(release: Release, limits: Limits | None = None) -> None:
    """Opens the release in a process of its own and asks its users; ReleaseError says what was wrong."""
    limits = limits or limits_of(release)
    try:
        with _Twin(release, limits) as twin:
            twin.line(limits.open_s, "it was not open")
            fault = json.loads(twin.line(limits.ask_s, "it did not answer"))["fault"]
    except ReleaseError as error:
        fault = str(error)
    if fault:
        raise ReleaseError(f"asked in a process of its own: {fault}")


class _Twin:
    """Holds the twin's process, and ends it."""

    def __init__(self, release: Release, limits: Limits) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        command = [sys.executable, "-m", "ensemble.server.twin", str(release.repository), release.name]
        self._process = subprocess.Popen(
            [*command, str(limits.memory_bytes), str(math.ceil(limits.cpu_s))],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="twin", daemon=True)
        self._reader.start()

    def __enter__(self) -> _Twin:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._errors.close()

    def _read(self) -> None:
        """Passes its lines on, and an empty one when it has ended."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def line(self, limit_s: float, late: str) -> str:
        """Gives the next line; ReleaseError that says `late` if none comes in time, or how it ended."""
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise ReleaseError(f"{late} within {limit_s:.0f} s") from None
        if not line:
            raise ReleaseError(self._ending())
        return line

    def _ending(self) -> str:
        """Says how it ended."""
        code = self._process.wait()
        self._errors.seek(0)
        said = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        if code == -signal.SIGXCPU:
            return "it took more time of a core than a release of its size may"
        how = f"it died of {signal.Signals(-code).name}" if code < 0 else "it said"
        return f"{how}: {said}" if said else how


def _environment() -> dict[str, str]:
    """Gives the twin's environment: our packages, one thread, and nothing of a server's."""
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    kept = {k: v for k, v in os.environ.items() if k not in (ENGINE_VARIABLE, INDEX_VARIABLE, TIERS_VARIABLE)}
    return {**kept, **ours}


class _AsBuilt(ServedRelease):
    """Is a release without the changes that were made to its items since."""

    @property
    def live_folder(self) -> Path:
        """Names a folder that is not there."""
        return self.path / "none"


def main(repository: Path, name: str, memory_bytes: int, cpu_s: int) -> None:
    """Is the twin's process: opens, says so, asks and says what is wrong."""
    from ensemble.local import LocalPipeline

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    release = _AsBuilt(repository, name, open_served(repository, name).manifest)
    release.verify_data(CANARY)
    canary = read_canary(release.path / CANARY)
    pipelines = {pipeline: LocalPipeline(release, pipeline) for pipeline in release.pipelines}
    print("open", flush=True)
    fault = canary.fault(pipelines[PIPELINE].recommend(canary.user_ids, canary.options), SAME_ENGINE)
    if SEARCH in pipelines and not fault:
        texts = [read_search(release.path).probe] * len(canary.user_ids)
        found = pipelines[SEARCH].search(canary.user_ids, texts, parameters=canary.options)
        fault = canary.fault_of_search(found)
        if not fault and not (found["item_ids"] != b"").any():
            fault = f"search finds nothing for {texts[0]!r}, which the build made of a title"
    print(json.dumps({"fault": fault}), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except PeregrineError as error:
        sys.exit(str(error))

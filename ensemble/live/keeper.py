"""Keeps the process that writes live items alive beside a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ensemble.live.merge_process import module_process
from ensemble.release.files import try_flock
from ensemble.vitals import vitals_of
from ensemble.waiting import wait_for

AT_WORK = 3  # exit code of a writer where another one writes already
_POLL_S, _LOOKS_S, _SILENT_S, _ENDS_WITHIN_S = 0.05, 0.5, 5.0, 30.0
_STOPPED_S = 1.0  # a writer that was stopped is given up
_FIRST_RESTART_S, _LONGEST_RESTART_S = 0.2, 10.0  # after writers that died, twice as long each time


@contextlib.contextmanager
def service_process(
    repository: Path, log: Callable[[str], None] = lambda line: None, home: Path | None = None
) -> Iterator[None]:
    """Runs the writer's process while the block runs, which begins when the overlay of the active release has
    all that the catalogue's log has.

    Changes lie in `home`, which is the repository if not given. Where it cannot be written to there is no
    writer from here; where somebody writes already, this one waits to take over.
    """
    home = home or repository
    if not os.access(home, os.W_OK):
        log(f"items: {home} cannot be written to, so items cannot be changed from here")
        yield
        return
    keeper = _Keeper(repository, home, log)
    keeper.start()
    try:
        if not keeper.ready.wait(_SILENT_S):
            log("items: the catalogue's log is being read")
        wait_for(keeper.ready)
        yield
    finally:
        keeper.ended.set()
        keeper.join()


class _Keeper(threading.Thread):
    """Runs the writer's process until `ended`; one that dies is replaced, sooner if it had lived for long.

    `ready` is set when the first one answers, or has ended.
    """

    def __init__(self, repository: Path, home: Path, log: Callable[[str], None]) -> None:
        super().__init__(name="items-keeper")
        self._repository, self._home, self._log = repository, home, log
        self.ended, self.ready = threading.Event(), threading.Event()

    def run(self) -> None:
        """Is the thread."""
        pause_s = _FIRST_RESTART_S
        while not self.ended.is_set():
            started_s = time.monotonic()
            code = self._run_once()
            self.ready.set()
            if code is None or code == 2:
                return  # it has said why it cannot write here: it would not be otherwise the next time
            if code == AT_WORK:
                self._wait_for_the_other()
                continue
            lived_long = time.monotonic() - started_s > _LONGEST_RESTART_S
            pause_s = _FIRST_RESTART_S if lived_long else min(2 * pause_s, _LONGEST_RESTART_S)
            self._log(f"items: the writer died ({_ending(code)}); a new one starts in {pause_s:.1f} s")
            self.ended.wait(pause_s)

    def _run_once(self) -> int | None:
        """Runs a writer; gives its exit code, None where it was ended by us."""
        arguments = (str(self._repository), str(self._home))
        process = module_process("ensemble.live.service", *arguments, stdin=subprocess.PIPE)
        stopped_since = None
        while process.poll() is None and not self.ended.wait(_POLL_S):
            vitals = vitals_of(process.pid)
            if vitals is None or not vitals.is_stopped:
                stopped_since = None
            elif time.monotonic() - (stopped_since := stopped_since or time.monotonic()) >= _STOPPED_S:
                process.kill()  # nobody would hear of it; what it has acknowledged is durable
            if not self.ready.is_set() and _writer_pid(self._home) == process.pid:
                self.ready.set()
        if not self.ended.is_set():
            return process.returncode
        process.terminate()
        try:
            process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:  # what it has acknowledged is durable
            process.kill()
            process.wait()
        return None

    def _wait_for_the_other(self) -> None:
        """Waits until nobody writes."""
        self._log(
            f"items: another process writes the items of {self._home}; this one takes over when it ends"
        )
        while not self.ended.wait(_LOOKS_S):
            with contextlib.suppress(OSError):
                lock = os.open(self._home / ".live" / "lock", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if try_flock(lock):
                        return
                finally:
                    os.close(lock)


def _writer_pid(home: Path) -> int:
    """Gives the process id of the writer that answers; 0 while there is none."""
    try:
        return int(json.loads((home / ".live" / "writer.json").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return 0


def _ending(code: int) -> str:
    """Says how a process ended."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

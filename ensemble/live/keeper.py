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

_POLL_S, _SILENT_S, _ENDS_WITHIN_S = 0.05, 5.0, 30.0
_FIRST_RESTART_S, _LONGEST_RESTART_S = 0.2, 10.0  # after writers that died, twice as long each time


@contextlib.contextmanager
def service_process(repository: Path, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Runs the writer's process while the block runs, which begins when the overlay of the active release has
    all that the catalogue's log has.

    A repository that cannot be written to, or has a writer, gets none.
    """
    if not os.access(repository, os.W_OK):
        log(f"items: {repository} cannot be written to, so items cannot be changed from here")
        yield
        return
    ended, ready = threading.Event(), threading.Event()
    keeper = threading.Thread(target=_keep_alive, args=(repository, log, ended, ready), name="items-keeper")
    keeper.start()
    try:
        if not ready.wait(_SILENT_S):
            log("items: the catalogue's log is being read")
        ready.wait()
        yield
    finally:
        ended.set()
        keeper.join()


def _keep_alive(
    repository: Path, log: Callable[[str], None], ended: threading.Event, ready: threading.Event
) -> None:
    """Runs the writer's process until `ended`; one that dies is replaced, sooner if it had lived for long.

    `ready` is set when the first one answers, or has ended.
    """
    pause_s = _FIRST_RESTART_S
    while not ended.is_set():
        started_s = time.monotonic()
        process = module_process("ensemble.live.service", str(repository), stdin=subprocess.PIPE)
        while process.poll() is None and not ended.wait(_POLL_S):
            if not ready.is_set() and _writer_pid(repository) == process.pid:
                ready.set()
        ready.set()
        if ended.is_set():
            process.terminate()
            try:
                process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:  # what it has acknowledged is durable
                process.kill()
                process.wait()
            return
        if process.returncode == 2:
            return  # it has said why it cannot write here: it would not be otherwise the next time
        lived_long = time.monotonic() - started_s > _LONGEST_RESTART_S
        pause_s = _FIRST_RESTART_S if lived_long else min(2 * pause_s, _LONGEST_RESTART_S)
        log(f"items: the writer died ({_ending(process.returncode)}); a new one starts in {pause_s:.1f} s")
        ended.wait(pause_s)


def _writer_pid(repository: Path) -> int:
    """Gives the process id of the writer that answers; 0 while there is none."""
    try:
        return int(json.loads((repository / ".live" / "writer.json").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return 0


def _ending(code: int) -> str:
    """Says how a process ended."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

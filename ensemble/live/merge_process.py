"""Runs a merge in a process of its own: in idle time first, and in a share of a busy machine's time later."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from typing import Any

from ensemble.errors import ReleaseError
from ensemble.live.overlay import Overlay

IDLE_ONLY_S = 60.0  # how long a merge gets nothing but idle time


class MergeProcess:
    """Merges all changes of one overlay up to now; they go into that overlay and into no other."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay, self.sequence = overlay, overlay.sequence
        self._process = self._start()
        # A niced one would be let finish its slices of 8 ms.
        os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
        self._idle_until_s = time.monotonic() + IDLE_ONLY_S

    def generation(self) -> int | None:
        """Gives the number of the generation that it has written, None while it is at work; ReleaseError with
        its last words when it failed."""
        if self._process.poll() is None:
            if time.monotonic() > self._idle_until_s:
                self._hurry()
            return None
        number, complaint = self._process.communicate()
        if self._process.returncode != 0:
            ending = complaint.strip()[-300:] or f"exit code {self._process.returncode}"
            raise ReleaseError(f"merging failed: {ending}")
        return int(number)

    def stop(self) -> None:
        """Ends the process; what it has written so far is swept by the overlay's next writer."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        """Starts merging."""
        release = self.overlay.release
        arguments = (str(release.repository), release.name, str(self.sequence), str(release.home))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return module_process("ensemble.live.merge", *arguments, **pipes)

    def _hurry(self) -> None:
        """Gives it a share of the time: without idle time it would never end, and what is searched beside the
        index would grow."""
        self._idle_until_s = math.inf
        try:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
            os.sched_setscheduler(self._process.pid, os.SCHED_OTHER, os.sched_param(0))
        except PermissionError:
            # Only with CAP_SYS_NICE may one take a process out of SCHED_IDLE; others begin again outside.
            self.stop()
            self._process = self._start()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)


def module_process(module: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Starts a module of ours as a process that imports what we do, on one thread: serving comes first."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, **options)

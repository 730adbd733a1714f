"""Builds a shop by the product's own command, in a process of its own, and says what that cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from builders.folders import SOURCES
from ensemble.errors import ReleaseError


@dataclass(frozen=True)
class Built:
    """Holds a release that a build has made, and its cost."""

    repository: Path
    release: str
    cost: dict[str, Any]  # seconds, cpu_seconds, peak_bytes; skipped: stages that an earlier build had done


def build(
    shop: Path, repository: Path, preset: str, seed: int, log: Path, tell: Callable[[str], None]
) -> Built:
    """Runs `peregrine build --no-refit`: what is published is then the very model that the held-out rows
    judge. The build's lines go to `log` and to `tell`; ReleaseError with its last line where it fails."""
    command = [sys.executable, "-m", "peregrine", "build", str(shop), "--repository", str(repository)]
    command += ["--preset", preset, "--seed", str(seed), "--no-refit", "--json"]
    begun = time.monotonic()
    with tempfile.TemporaryFile() as answer, log.open("w") as lines:
        code, used, last = _run(command, answer, lines, tell)
        if code:
            raise ReleaseError(f"`peregrine build` ended with {code}: {last}", f"its lines are in {log}")
        answer.seek(0)
        told = json.load(answer)
    cost = {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "skipped": [stage["stage"] for stage in told["stages"] if stage["skipped"]],
        "stages": {stage["stage"]: stage["duration_s"] for stage in told["stages"]},
    }
    return Built(repository, told["release"], cost)


def _run(
    command: list[str], answer: IO[bytes], lines: IO[str], tell: Callable[[str], None]
) -> tuple[int, Any, str]:
    """Runs a command to its end: its exit code, what it used (it and its own children), its last line."""
    path = os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH"))))
    environment, last = {**os.environ, "PYTHONPATH": path}, ""
    with subprocess.Popen(
        command, stdout=answer, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.write(line)
            lines.flush()
            last = line.strip() or last
            tell(line.rstrip())
        # wait4 alone says what this one child used, not all that ever were
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used, last

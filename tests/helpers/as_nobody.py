"""Runs a program as a user without rights or capabilities, on a repository that lies on a read-only mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shops import ROOT

NOBODY = 65534
# Runs as root in a mount namespace of its own: opens the way to Python and to us where root's home is in it,
# makes the folder read-only, and becomes nobody.
_ENTER = """\
import os, subprocess, sys
from pathlib import Path
read_only, needed = sys.argv[1], sys.argv[2].split(":")
def mount(*words):
    subprocess.run(["mount", *words], check=True)
closed = {}
for path in map(Path, needed):
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 1:
            closed.setdefault(folder, []).append(path)
            break
mount("-t", "tmpfs", "none", "/mnt")
for folder, paths in closed.items():
    for number, path in enumerate(paths):
        Path(f"/mnt/{number}").mkdir(exist_ok=True)
        mount("--bind", str(path), f"/mnt/{number}")
    mount("-t", "tmpfs", "-o", "mode=755", "none", str(folder))
    for number, path in enumerate(paths):
        path.mkdir(parents=True, exist_ok=True)
        mount("--bind", f"/mnt/{number}", str(path))
mount("--bind", read_only, read_only)
mount("-o", "remount,bind,ro", read_only)
os.execvp("setpriv", ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all",
    "--bounding-set=-all", "--no-new-privs", *sys.argv[3:]])
"""


@cache
def why_not() -> str:
    """Says what keeps this machine from it; empty: nothing."""
    if os.geteuid() != 0:
        return "only root may become another user"
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        return "unshare or setpriv is not installed (Debian: util-linux)"
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return "" if done.returncode == 0 else "nobody may mount here"


def run_as_nobody(
    read_only: Path, program: str, arguments: Sequence[str], limit_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a program of Python as nobody, who finds the folder on a read-only mount."""
    needed = [sys.base_prefix, sys.prefix, str(ROOT)]
    python = [sys.executable, "-c", program, *arguments]
    enter = ["unshare", "-m", "--propagation", "private", sys.executable, "-S", "-c", _ENTER]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "PEREGRINE_"))}
    return subprocess.run(
        [*enter, str(read_only), ":".join(needed), *python],
        cwd="/",
        env={
            **kept,
            "HOME": "/nonexistent",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )

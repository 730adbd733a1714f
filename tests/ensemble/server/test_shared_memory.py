"""`serve` says before it starts that /dev/shm is too small for what a release may pass there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shops import ROOT, one_thread, private_copy

from ensemble.release.release import open_release
from ensemble.release.shared_memory import shm_bytes
from ensemble.server.checks import warn_of_shared_memory
from ensemble.server.options import ServeOptions

# With a /dev/shm of its own, of so many MiB, which goes with the process
ASIDE = ["unshare", "--mount", "--map-root-user", "--kill-child", "sh", "-c"]
SMALL = 'mount -t tmpfs -o size=8m shm /dev/shm && exec "$@"'


def can_be_aside() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*ASIDE, SMALL, "sh", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.triton
def test_a_server_whose_shared_memory_is_small_says_so_with_the_cure(
    tiny_repository: Path, tmp_path: Path
) -> None:
    if not can_be_aside():
        pytest.skip("no mount namespaces: unshare is refused here")
    repository = private_copy(tiny_repository, tmp_path / "repository")
    need = shm_bytes(open_release(repository, "r1").schema) >> 20
    serve = [sys.executable, ROOT / "peregrine.py", "serve", "-r", repository, "--state", tmp_path / "state"]
    process = subprocess.Popen(
        [*ASIDE, SMALL, "sh", *map(str, serve), "--port", "0", "--metrics-port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=one_thread(PYTHONPATH=str(ROOT)),
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "WARNING" in line)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert f"/dev/shm has 8 MiB free, and release r1 may take {need}: " in line
    assert f"compose's SHM={need}m" in line


def test_what_is_asked_of_a_server_counts(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, said = open_release(tiny_repository, "r1"), list[str]()
    usage = shutil.disk_usage("/dev/shm")
    enough = shm_bytes(release.schema, fused=True, instances=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    warn_of_shared_memory(release, ServeOptions(fused=True, instances=1), said.append)
    assert said == []
    warn_of_shared_memory(release, ServeOptions(instances=4), said.append)
    assert len(said) == 1

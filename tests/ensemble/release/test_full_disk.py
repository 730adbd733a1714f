"""A full disk keeps nobody from activating a release or from serving it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_repository import allow_toys, publish_toy

from clients.operations import releases
from ensemble.release.repository import locked
from ensemble.release.route import read_route
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    assert os.statvfs(disk).f_bavail == 0


@pytest.mark.triton
def test_a_full_disk_stops_neither_activate_nor_serve(disk: Path, tmp_path: Path, monkeypatch) -> None:
    allow_toys(monkeypatch)
    repository = disk / "models"
    publish_toy(repository, "r1", tmp_path, activate=True)
    publish_toy(repository, "r2", tmp_path)
    with locked(repository):
        pass
    fill(disk)
    releases.activate(repository, "r2")
    assert read_route(repository).releases == ("r2",)
    with serve(repository, ServeOptions(port=0, metrics_port=None, state=tmp_path / "state")) as server:
        assert server.release == "r2"
        releases.activate(repository, "r1")
        assert server.release == "r1"

"""A repository with two releases, for features that meet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shops import ROOT, one_thread


@pytest.fixture(scope="session")
def two_releases(tiny_shop: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with r1, active, and r2 of the same stages; not to be changed."""
    repository = tmp_path_factory.mktemp("two") / "repository"
    shutil.copytree(tiny_shop.parent / "repository", repository)  # with its stages: nothing is trained again
    command = [sys.executable, "-m", "peregrine", "build", str(tiny_shop), "--preset", "tiny"]
    command += ["--repository", str(repository), "--release", "r2"]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return repository

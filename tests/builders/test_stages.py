"""Stages skip what is done, and a disk that fills up costs one line, no traceback and no half-written
folder."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from builders.stages import Stages
from ensemble.errors import ReleaseError


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path / "stages", Console(quiet=True))


def test_a_stage_runs_once_for_the_same_options(stages):
    ran = []

    def work(folder, report):
        ran.append(folder.name)
        np.save(folder / "x.npy", np.zeros(3))

    first, second, third = (
        stages.run("data", work, 1),
        stages.run("data", work, 1),
        stages.run("data", work, 2),
    )
    assert (first.skipped, second.skipped, third.skipped) == (False, True, False)
    assert first.folder == second.folder != third.folder
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"stage index: no space left in .*finished stages are kept",
        ),
        (
            RuntimeError("faiss: write error: 0 != 1 (No space left on device)"),
            r"stage index: no space left in ",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            r"stage index: cannot write /a/b: Permission denied; .*--repository",
        ),
    ],
    ids=["full", "full, says Faiss", "read-only"],
)
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing_half_written(stages, error, told):
    def work(folder, report):
        (folder / "half").write_text("written")
        raise error

    with pytest.raises(ReleaseError, match=told):
        stages.run("index", work, None)
    assert list(stages.root.iterdir()) == []


def test_any_other_error_is_not_dressed_up(stages):
    def work(folder, report):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        stages.run("index", work, None)

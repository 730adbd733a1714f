"""Builds plans of a whole release with NVIDIA's own builder, which needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shops import private_copy

if TYPE_CHECKING:
    from builders.compile.stage import Compiled


def built_ahead(repository: Path, release: str, folder: Path) -> dict[str, Compiled]:
    """Compiles a copy of the repository in `folder` for RTX cards; asserts that the builder warns of nothing.

    What is said of int8 there is no warning.
    """
    pytest.importorskip("tensorrt_rtx_bindings", reason="the wheels tensorrt-rtx-cu13-* are not installed")
    from builders.compile.stage import compile_release, toolchain

    copy = private_copy(repository, folder / "repository")
    done = {one.model: one for one in compile_release(copy, release, toolchain("rtx", ahead=True))}
    warned = {name: one.notes for name, one in done.items() if any("int8" not in note for note in one.notes)}
    assert warned == {}
    return done

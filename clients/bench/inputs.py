"""Reads what measurements of a server are told: a repository, which they copy, and ways of serving."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ensemble.errors import InvalidInput

WAYS = ("ensemble", "fused")


def working_copy(repository: Path, target: Path) -> Path:
    """Copies a repository, without the builds, locks and servers of others, to do with as a test likes."""
    return shutil.copytree(repository, target, ignore=shutil.ignore_patterns(".build", ".lock", ".servers"))


def check_ways(ways: Sequence[str]) -> None:
    """Raises InvalidInput for a way of serving that there is not."""
    if unknown := sorted(set(ways) - set(WAYS)):
        raise InvalidInput(f"--ways: there is no {unknown[0]!r}; there are {', '.join(WAYS)}")

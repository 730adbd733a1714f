"""Opens a release that is still being built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ensemble.steps.served import ServedRelease

SOURCES_FILE = "sources.json"  # what each source adds, and what was tried: for the report


class StagedRelease(ServedRelease):
    """Opens a release that is still being built: its files lie in one folder, without a manifest."""

    def __init__(self, folder: Path, name: str = "staged") -> None:
        super().__init__(folder.parent, name, {})
        self.path = folder

    def verify(self, paths: Iterable[Path] | None = None) -> None:
        """Does nothing: there is nothing to compare with yet."""

    def member_file(self, model: str, file: str) -> Path:
        """Gives the path of an engine, which lies beside a staged release's data."""
        return self.path / "engines" / model / file

"""Finds the releases that some process has loaded: the overlays of these, and of no others, are kept up to
date."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

from ensemble.errors import ReleaseError
from ensemble.live.generations import read_current
from ensemble.live.instances import sequences
from ensemble.live.log import OldLog
from ensemble.release.manifest import MANIFEST
from ensemble.release.release import Release, open_release

_FOLDER = re.compile(r"(?P<name>.+)-(?P<id>[0-9a-f]{16})")
_EVERY_S, _SILENT_S = 1.0, 60.0
_EXPECTED_S = 600.0  # how long a release that is about to be loaded is waited for


class LoadedReleases:
    """Looks into the overlays' folders, where living instances say how far they are."""

    def __init__(self, repository: Path, home: Path) -> None:
        self.repository, self._home = repository, home
        self._opened: dict[str, Release] = {}  # by id
        self._expected_until_s: dict[str, float] = {}
        self._silent_until_s: dict[str, float] = {}
        self._next_s = 0.0

    def is_time(self) -> bool:
        """Says whether it is time to look again; so at most once a second."""
        if time.monotonic() < self._next_s:
            return False
        self._next_s = time.monotonic() + _EVERY_S
        return True

    def complain(self, release: Release, line: str, log: Callable[[str], None]) -> None:
        """Logs what is wrong with a release, at most once a minute."""
        if time.monotonic() >= self._silent_until_s.get(release.id, 0.0):
            self._silent_until_s[release.id] = time.monotonic() + _SILENT_S
            log(line)

    def expect(self, release: Release) -> None:
        """Counts a release as loaded for some minutes: its instances are about to start."""
        self._opened[release.id] = release
        self._expected_until_s[release.id] = time.monotonic() + _EXPECTED_S

    def wanted(self, active: Release) -> dict[str, Release]:
        """Gives the releases that are loaded or about to be, and the active one, by id."""
        now_s = time.monotonic()
        self._expected_until_s = {r: until for r, until in self._expected_until_s.items() if until > now_s}
        wanted = {active.id: active}
        for folder in (self._home / ".live").iterdir():
            match = _FOLDER.fullmatch(folder.name)
            if match and (match["id"] in self._expected_until_s or sequences(folder)):
                release = self._release(match["name"], match["id"])
                if release is not None:
                    wanted.setdefault(release.id, release)
        self._opened = {r: release for r, release in self._opened.items() if r in wanted}
        return wanted

    def sweep(self, followed: Collection[Path]) -> list[str]:
        """Removes the overlays of releases that the repository has no more, but for `followed` ones; gives
        their names. They would be made again if the release came back."""
        removed = []
        for folder in set((self._home / ".live").iterdir()) - set(followed):
            match = _FOLDER.fullmatch(folder.name)
            is_orphan = match and not (self.repository / match["name"] / MANIFEST).exists()
            if is_orphan and not sequences(folder) and not _is_old(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        return removed

    def _release(self, name: str, release_id: str) -> Release | None:
        """Opens a release; None where the repository has it no more, or another one of its name."""
        if not (self.repository / name / MANIFEST).exists():  # removed since it was opened
            self._opened.pop(release_id, None)
            return None
        if release_id not in self._opened:
            try:
                release = open_release(self.repository, name, self._home)
            except ReleaseError:
                return None
            if release.id != release_id:
                return None
            self._opened[release_id] = release
        return self._opened[release_id]


def _is_old(folder: Path) -> bool:
    """Says whether an earlier Peregrine wrote a folder, whose changes are nowhere else."""
    try:
        read_current(folder)
    except OldLog:
        return True
    except ReleaseError:
        return False
    return False

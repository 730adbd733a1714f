"""Says how far each instance is: one small file an instance, locked while it lives.

A change is done when all have it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import uuid
from pathlib import Path
from typing import Any

from ensemble.release.files import try_flock

_SEQUENCE = struct.Struct("<Q")
_FIRST_SIGNS_S = 0.25


class InstanceFile:
    """Holds this instance's number in a file.

    The lock on it, not its name, says that the instance lives: process ids come again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptor, self._published = folder / "instances", -1, -1
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def publish(self, sequence: int) -> None:
        """Writes the number where it changed.

        In a repository that cannot be written to there is no writer to read it either.
        """
        if sequence == self._published:
            return
        if self._descriptor < 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)  # so the writer learns that we are loaded
                self._descriptor = os.open(
                    self._folder / f".{self._name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
                )
            except OSError:
                return
            # Before it has the name that sequences() looks for: it removes what nobody holds
            try_flock(self._descriptor)
            (self._folder / f".{self._name}").rename(self._folder / self._name)
        os.pwrite(self._descriptor, _SEQUENCE.pack(sequence), 0)
        self._published = sequence

    def close(self) -> None:
        """Removes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):
                (self._folder / self._name).unlink()


def sequences(folder: Path) -> dict[str, int]:
    """Gives {living instance: the last sequence number it has}; removes the files of dead ones."""
    numbers = {}
    for path in sorted((folder / "instances").glob("[0-9]*")) if (folder / "instances").is_dir() else ():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if try_flock(descriptor):
                path.unlink(missing_ok=True)
            elif len(raw := os.pread(descriptor, _SEQUENCE.size, 0)) == _SEQUENCE.size:
                numbers[path.name] = _SEQUENCE.unpack(raw)[0]
        finally:
            os.close(descriptor)
    return numbers


def wait_for_instances(opened_at: float, folders: list[Path], sequence: int, wait_s: float) -> dict[str, Any]:
    """Waits until every living instance has the change, or the time is over."""
    deadline = time.monotonic() + wait_s
    if wait_s > 0:
        # Instances look for a first log every so often, and only then say that they are there.
        time.sleep(max(0.0, min(opened_at + _FIRST_SIGNS_S, deadline) - time.monotonic()))
    while True:
        numbers = {name: has for folder in folders for name, has in sequences(folder).items()}
        done = all(has >= sequence for has in numbers.values())
        if done or time.monotonic() >= deadline:
            return {"done": done, "instances": numbers}
        time.sleep(0.005)

"""Follows a file of lines that others write: for ever, across rotations, and on from where it was before."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ensemble.errors import InvalidInput, ServerError

_WAIT_S = 0.05
_LONGEST_WAIT_S = 30.0  # between two tries to reach a server
_SAY_AGAIN_S = 60.0
_READ_BYTES = 1 << 16
_LINE_BYTES = 1 << 20

_T = TypeVar("_T")


class FollowedFile:
    """Gives whole lines of `path`, and keeps in `state` how far they have been dealt with."""

    def __init__(self, path: Path, state: Path) -> None:
        self.path, self.state = path, state
        self._kept: tuple[int, int] | None = None
        self._descriptor, self.offset = self._opened()

    def lines(self) -> Iterator[bytes | None]:
        """Gives whole lines, and None whenever there is nothing more for now; never ends by itself.

        A file that was renamed is read to its end before the new one of its name; one that was cut is read
        from its start.
        """
        held, rotated = b"", False
        while True:
            data = os.read(self._descriptor, _READ_BYTES)
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                self.offset += len(line) + 1
                yield line
            if len(held) > _LINE_BYTES:  # it cannot be an event
                self.offset += len(held)
                yield held
                held = b""
            if data:
                continue
            yield None
            if rotated:
                if held:  # the old file's last line, without an end
                    self.offset += len(held)
                    yield held
                    yield None
                held, rotated = b"", False
                self._reopen()
            elif self._is_rotated():  # lines may have come between the last look and the new name
                rotated = True
                time.sleep(_WAIT_S)
            elif os.fstat(self._descriptor).st_size < self.offset:
                print(f"{self.path} was cut; read from its start", file=sys.stderr)
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                held, self.offset = b"", 0
            else:
                time.sleep(_WAIT_S)

    def keep(self) -> None:
        """Writes down that all lines given so far have been dealt with."""
        now = (os.fstat(self._descriptor).st_ino, self.offset)
        if now == self._kept:
            return
        text = json.dumps({"inode": now[0], "offset": now[1]}, allow_nan=False)
        beside = self.state.with_name(f".{self.state.name}.new")
        try:
            beside.write_text(text + "\n")
            beside.replace(self.state)
        except OSError as error:
            if self._kept is None:
                print(
                    f"{self.state}: {error.strerror}; a restart will read the file from its start "
                    "(--offset FILE names a place that can be written)",
                    file=sys.stderr,
                )
        self._kept = now

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _opened(self) -> tuple[int, int]:
        """Opens the file that was read last, under whatever name it is now, where it was left; else `path`
        from its start."""
        try:
            kept = json.loads(self.state.read_text())
            inode, offset = int(kept["inode"]), int(kept["offset"])
        except (OSError, ValueError, KeyError, TypeError):
            inode, offset = -1, 0
        for path in (self.path, *sorted(self.path.parent.glob(f"{self.path.name}*"))):
            try:
                found = path.stat()
            except OSError:
                continue
            if found.st_ino == inode and found.st_size >= offset:
                descriptor = _open(path)
                os.lseek(descriptor, offset, os.SEEK_SET)
                return descriptor, offset
        return _open(self.path), 0

    def _is_rotated(self) -> bool:
        """Says whether another file has the name now; while none has, the old one is waited on."""
        try:
            return os.stat(self.path).st_ino != os.fstat(self._descriptor).st_ino
        except OSError:
            return False

    def _reopen(self) -> None:
        """Goes over to the file that has the name now; stays where none has it again already."""
        try:
            descriptor = _open(self.path)
        except InvalidInput:
            return
        os.close(self._descriptor)
        self._descriptor, self.offset = descriptor, 0


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None


def patiently(work: Callable[[], _T]) -> _T:
    """Does `work`, again and again while its server cannot be reached; says so at first, then every
    minute."""
    wait_s, said = 0.25, 0.0
    while True:
        try:
            return work()
        except ServerError as error:
            now = time.monotonic()
            if not said or now - said > _SAY_AGAIN_S:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
                said = now
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

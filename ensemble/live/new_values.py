"""Numbers the values that a release's vocabularies lack, so that filters and caps find them all the same.

Models take such a value as unknown, as they do one that fell out of the vocabulary. In an overlay's rows it
has a code of its own, behind all codes of the release. One JSON line a value: its place in the file is its
code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.schema import Schema

MOST = 200_000  # values kept; what comes then is unknown to filters, too


def values_file(folder: Path, number: int) -> Path:
    """Names a file of new values in an overlay's folder."""
    return folder / f"values-{number}"


class NewValues:
    """Holds the values of one overlay; every instance reads them, the writer adds to them."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path
        self._first = max((f.offset + f.size for f in schema.items.features if f.is_code), default=1)
        self._codes: dict[tuple[str, str], int] = {}
        self._offset, self._unwritten = 0, b""
        self.refresh()

    def __len__(self) -> int:
        return len(self._codes)

    def refresh(self) -> None:
        """Reads what the writer has added."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return
        for line in lines:
            try:
                feature, value = json.loads(line)
            except ValueError:
                raise ReleaseError(f"{self.path} is damaged at offset {self._offset}") from None
            self._codes.setdefault((feature, value), self._first + len(self._codes))
            self._offset += len(line) + 1

    def codes(self, feature: str, values: list[str]) -> list[int]:
        """Gives the codes of those of the values that some item has."""
        if any((feature, value) not in self._codes for value in values):
            self.refresh()
        return [self._codes[feature, value] for value in values if (feature, value) in self._codes]

    def add(self, feature: str, value: str) -> int:
        """Gives a value its code, a new one where it has none; -1 when there are too many.

        Others know of it from flush() on, which has to come before any row that has the code.
        """
        if (feature, value) not in self._codes and len(self._codes) < MOST:
            self._codes[feature, value] = self._first + len(self._codes)
            self._unwritten += json.dumps([feature, value]).encode() + b"\n"
        return self._codes.get((feature, value), -1)

    def flush(self) -> None:
        """Writes what was added."""
        if not self._unwritten:
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(descriptor, self._offset)  # behind what is whole may lie a torn line
                written = os.pwrite(descriptor, self._unwritten, self._offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ReleaseError(f"cannot write {self.path}: {error.strerror}") from error
        if written < len(self._unwritten):
            raise ReleaseError(f"cannot write {self.path}: no space left")
        self._offset, self._unwritten = self._offset + written, b""

    def has_all(self, codes: Array) -> bool:
        """Says whether every code in rows of codes [n, C] is the release's or one of these."""
        return int(codes.max(initial=0)) < self._first + len(self._codes)

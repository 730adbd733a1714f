"""Writes, locks and digests files so that a power cut or a second process does no harm."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

# An empty file of this name stands beside each model.py, so that Python can put no bytecode there.
NO_BYTECODE = "__pycache__"
LOCK, RESERVE_BYTES, _KEPT_BYTES = ".lock", 1 << 17, 32
_PARTIAL = re.compile(r"\..+\.\d+")  # what write_durably names its temporary file


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a file through a temporary one and a rename, down to the disk. Where that is full, the room that
    a lock has kept free is given up for it."""
    data = content.encode() if isinstance(content, str) else content
    try:
        _write(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _give_up_reserve(path):
            raise
        _write(path, data)


def _write(path: Path, data: bytes) -> None:
    """Writes a file once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def keep_reserve(lock: int, text: bytes) -> None:
    """Writes a text into an open lock file, and behind it RESERVE_BYTES that a full disk may take."""
    os.pwrite(lock, text.ljust(RESERVE_BYTES), 0)


def _give_up_reserve(path: Path) -> bool:
    """Shortens the lock of a file's folder, or of the one above; says whether that made room."""
    for folder in (path.parent, path.parent.parent):
        with contextlib.suppress(OSError):
            if (folder / LOCK).stat().st_size > _KEPT_BYTES:
                os.truncate(folder / LOCK, _KEPT_BYTES)
                return True
    return False


def partial_files(folder: Path) -> list[Path]:
    """Lists what killed calls of write_durably left in a folder."""
    return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name) and path.is_file())


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_flock(descriptor: int) -> bool:
    """Takes an exclusive lock on an open file or folder if nobody has it, and says whether it did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(descriptor: int) -> bool:
    """Says whether somebody holds the exclusive lock of an open file; who asks at the same time is nobody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def file_sha256(path: Path) -> str:
    """Gives the hex digest of a file, read in large pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unlisted_paths(root: Path, listed: Collection[str]) -> Iterator[str]:
    """Finds what lies in the folders of the `listed` files and is none of them: files, links and folders.

    Paths are relative to `root`, a folder's with a slash behind it. OSError if a folder cannot be read.
    """
    expected = {str(parent) for path in listed for parent in Path(path).parents}
    folders = sorted({Path(path).parts[0] for path in listed})
    while folders:
        with os.scandir(root / (folder := folders.pop())) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    if relative in expected:
                        folders.append(relative)
                    else:
                        yield f"{relative}/"
                elif relative not in listed and not _forbids_bytecode(entry):
                    yield relative


def _forbids_bytecode(entry: os.DirEntry[str]) -> bool:
    """Says whether this is the empty file that keeps Python from writing bytecode."""
    return entry.name == NO_BYTECODE and entry.is_file(follow_symlinks=False) and not entry.stat().st_size

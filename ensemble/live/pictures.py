"""Keeps the pictures that come with changes of items, beside the catalogue's log, by their content.

The log names a picture "sha256:…"; the picture itself is durable before the log's line is. A picture that no
line names any more stays: another line may name it again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ensemble.content.pictures import MAX_BYTES
from ensemble.errors import ReleaseError
from ensemble.release.files import sync_folder

LOGGED = "sha256:"  # begins the name of a picture that came with a change
FOLDER = "pictures"
_NAME = re.compile(LOGGED + "[0-9a-f]{64}")


def picture_path(folder: Path, name: str) -> Path:
    """Gives the path of a logged picture below the folder of a log; nothing lies at that of another name."""
    return folder / FOLDER / (name.removeprefix(LOGGED) if _NAME.fullmatch(name) else "none")


def is_logged(value: Any) -> bool:
    """Says whether a value of an item is the name of a logged picture."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def picture_from_value(value: Any) -> bytes | None:
    """Reads what a change says of a picture, {"base64": "…"}; None where it has none, ValueError if it is no
    picture's bytes."""
    if value is None or value == "":
        return None
    text = value.get("base64") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(text, str):
        raise ValueError('must be a picture\'s bytes as {"base64": "…"} (`--image FILE` reads a file)')
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is no base64") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"has {len(data) / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:g} MB are taken")
    return data


def keep_picture(folder: Path, data: bytes) -> str:
    """Writes a picture durably below a log's folder, unless it is there; gives its name."""
    digest = hashlib.sha256(data).hexdigest()
    path = picture_path(folder, LOGGED + digest)
    if not path.is_file():
        temporary = path.with_name(f".{digest}.{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ReleaseError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    return LOGGED + digest


def read_picture(folder: Path, name: str) -> bytes:
    """Reads a logged picture; empty where it is not there any more."""
    try:
        return picture_path(folder, name).read_bytes()
    except OSError:
        return b""

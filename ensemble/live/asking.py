"""Asks the writer of a home how it is, for at most a moment."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

from ensemble.live import MAX_REQUEST_BYTES

_LIMIT_S = 1.5


def writer_status(home: Path) -> dict[str, Any]:
    """Says whether changes were ever made, who writes, and what it says of itself: `log`, `pid`, `answers`
    and, if it does, the fields of a status reply."""
    folder = home / ".live"
    found: dict[str, Any] = {"log": (folder / "catalogue" / "log").exists(), "pid": None, "answers": False}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads((folder / "writer.json").read_text(encoding="utf-8"))
        found["pid"] = int(entry["pid"])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_LIMIT_S)
            connection.connect(entry["socket"])
            with connection.makefile("rwb") as stream:
                stream.write(b'{"op": "status", "wait_s": 0}\n')
                stream.flush()
                reply = json.loads(stream.readline(MAX_REQUEST_BYTES))
        found |= {"answers": "error" not in reply, **reply}
    return found

"""Reads from /proc how a process is: whether it is stopped, and how long it has run on a core."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_STOPPED = "Tt"  # by a signal, or by a debugger
_STATE, _USER, _SYSTEM = 0, 11, 12  # places of /proc/<pid>/stat behind the command's name: proc(5)


class Vitals(NamedTuple):
    """Says how a process is."""

    is_stopped: bool
    ticks: int  # of a clock of 100 Hz, on all cores together


def vitals_of(pid: int) -> Vitals | None:
    """Reads a process's vitals; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[_STATE] in "ZX":
        return None
    return Vitals(fields[_STATE] in _STOPPED, int(fields[_USER]) + int(fields[_SYSTEM]))

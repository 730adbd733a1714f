"""Keeps what a home knows of the store that it follows: when it was last reached, and what is in the way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ensemble.release.files import write_durably

FILE = ".store.json"


@dataclass(frozen=True)
class StoreState:
    """Says when a store was last read, in Unix seconds; `problem` is empty if that was the last try."""

    url: str
    reached: float
    problem: str = ""


def read_store_state(home: Path) -> StoreState | None:
    """Reads what the last look at the store came to; None where nobody follows one, or it cannot be read."""
    try:
        entries = json.loads((home / FILE).read_text(encoding="utf-8"))
        return StoreState(str(entries["url"]), float(entries["reached"]), str(entries["problem"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_store_state(home: Path, state: StoreState) -> None:
    """Writes what a look at the store came to."""
    write_durably(home / FILE, json.dumps(asdict(state)) + "\n")

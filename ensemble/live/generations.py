"""Reads and writes the small file that says which segments and which log an overlay consists of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ensemble.errors import ReleaseError
from ensemble.live.log import refuse_old_log
from ensemble.release.files import write_durably


class Current(NamedTuple):
    """Names what is served: the segments, oldest first, and the log behind them, log-<generation>."""

    generation: int
    segments: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # segments of the generation before, which instances may still open


def read_current(folder: Path) -> Current:
    """Reads what is served; ReleaseError when the file that names it is damaged."""
    path = folder / "current"
    try:
        facts = json.loads(path.read_text())
        if isinstance(facts, int):
            refuse_old_log(folder / f"log-{facts}")
        return Current(int(facts["generation"]), tuple(facts["segments"]), tuple(facts["before"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(
            f"cannot read {path}: {error}",
            f"start the writer, `peregrine serve` or `peregrine items serve`: it makes {folder} again",
        ) from None


def point_to(folder: Path, current: Current) -> None:
    """Makes `current` what is served, in one step."""
    write_durably(folder / "current", json.dumps(current._asdict()) + "\n")

"""Remembers on disk that a release is being activated, so that a killed activation is finished or undone.

<repository>/.activation.json is written before the server is asked to load anything and removed when all is
done. The route is the truth: if it names the new release, the activation is finished, else undone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import ReleaseError
from ensemble.release.files import write_durably
from ensemble.release.release import active_release
from ensemble.release.repository import align_alias

FILE = ".activation.json"


@dataclass(frozen=True)
class Started:
    """Says which release was to take over from which; None where none was active."""

    release: str
    previous: str | None


def begin(repository: Path, started: Started) -> None:
    """Writes down that an activation begins. Call it under locked()."""
    write_durably(repository / FILE, json.dumps(dataclasses.asdict(started)) + "\n")


def unfinished(repository: Path) -> Started | None:
    """Gives the activation that has begun and not ended; under locked() it is one that was killed."""
    path = repository / FILE
    try:
        return Started(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(
            f"cannot read {path}, which remembers an activation that was killed: {error}",
            "remove it and activate a release",
        ) from error


def end(repository: Path) -> None:
    """Writes down that the activation has ended, well or not."""
    (repository / FILE).unlink(missing_ok=True)


def outcome(repository: Path, started: Started) -> str:
    """Says what becomes of a killed activation: the route tells."""
    active = active_release(repository)
    if active == started.release:
        return f"the activation of {started.release}, which was killed, is finished"
    return f"the activation of {started.release}, which was killed, is undone: {active or 'none'} is active"


def settle_on_disk(repository: Path) -> str:
    """Ends a killed activation where no server is running: whoever starts one loads what the route names.

    Gives what became of it; empty if there was none. Call it under locked().
    """
    align_alias(repository)
    started = unfinished(repository)
    if started is None:
        return ""
    end(repository)
    return outcome(repository, started)

"""Remembers on disk that the route is being changed, so that a killed activation is finished or undone.

<home>/.activation.json is written before the server is asked to load anything and removed when all is
done. The route is the truth: if it is the new one, the activation is finished, else undone. So it is for the
other changes: a canary, its promotion, its abort.
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
from ensemble.release.route import Share, read_route

FILE = ".activation.json"


# What changes a route, as people call it
ACTIVATION, CANARY, PROMOTION, ABORT = "activation", "canary", "promotion", "abort"


@dataclass(frozen=True)
class Started:
    """Says what was to become of the route, and what it was."""

    what: str  # ACTIVATION, CANARY, PROMOTION or ABORT
    after: tuple[Share, ...]
    before: tuple[Share, ...] = ()  # none where nothing was active

    @property
    def release(self) -> str:
        """Names the release that it is about: the one that comes, or that is tried."""
        if self.what == ABORT:
            main = self.after[0].release
            return next((one.release for one in self.before if one.release != main), main)
        return self.after[-1].release

    @property
    def previous(self) -> str:
        """Names the release that was the main one."""
        return self.before[0].release if self.before else "no release"

    @property
    def refusal(self) -> str:
        """Says what does not happen, and what goes on."""
        if self.what == ABORT:
            return f"release {self.release} is not taken out, and goes on"
        if self.what == CANARY:
            return f"release {self.release} is not tried, {self.previous} goes on"
        if self.release == self.previous:
            return f"release {self.release} is active, and could not be loaded again"
        return f"release {self.release} is not activated, {self.previous} goes on"


def begin(home: Path, started: Started) -> None:
    """Writes down that a change begins. Call it under locked()."""
    write_durably(home / FILE, json.dumps(dataclasses.asdict(started)) + "\n")


def unfinished(home: Path) -> Started | None:
    """Gives the change that has begun and not ended; under locked() it is one that was killed."""
    path = home / FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        after, before = (tuple(Share(**one) for one in entries[key]) for key in ("after", "before"))
        return Started(str(entries["what"]), after, before)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReleaseError(
            f"cannot read {path}, which remembers an activation that was killed: {error}",
            "remove it and activate a release",
        ) from error


def end(home: Path) -> None:
    """Writes down that the activation has ended, well or not."""
    (home / FILE).unlink(missing_ok=True)


def outcome(repository: Path, started: Started, home: Path | None = None) -> str:
    """Says what becomes of a killed change: the route tells."""
    route, what = (
        read_route(home or repository),
        f"the {started.what} of {started.release}, which was killed,",
    )
    if route is not None and route.shares == started.after:
        return f"{what} is finished"
    return f"{what} is undone: {active_release(repository, home) or 'none'} is active"


def settle_on_disk(repository: Path, home: Path | None = None) -> str:
    """Ends a killed activation where no server is running: whoever starts one loads what the route names.

    Gives what became of it; empty if there was none. Call it under locked().
    """
    align_alias(repository, home)
    started = unfinished(home or repository)
    if started is None:
        return ""
    end(home or repository)
    return outcome(repository, started, home)

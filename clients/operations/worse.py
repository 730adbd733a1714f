"""Asks, before a release is activated, whether it is worse than the active one, and refuses it if it is.

Builds keep what each held-out user's list was worth (ensemble/release/held_out.py). Where both releases have
the same rows, their verified models are compared on them: what is served may have been refitted since, and
nobody can measure that on rows that it has learned from.
"""

from __future__ import annotations

from ensemble.errors import ReleaseError
from ensemble.release.compared import comparison
from ensemble.release.release import Release, open_release


def refuse_worse(new: Release, previous: str | None, *, force: bool = False) -> str:
    """Gives a line on how a release does beside the one that is active, or nothing where there is no other.

    ReleaseError if it is surely worse, unless `force`; a release that is older than the active one is gone
    back to, whatever it is worth.
    """
    if previous in (None, new.name):
        return ""
    try:
        active = open_release(new.repository, str(previous))
        found = comparison(new, active)
    except ReleaseError as error:  # what is active is broken, and must be got rid of
        return f"cannot tell whether {new.name} is worse than {previous}: {error}"
    line, is_older = found.line(new.name, active.name), _created(new) < _created(active)
    if found.is_worse and not force and not is_older:
        raise ReleaseError(
            f"release {new.name} is not activated, {active.name} goes on: it is worse; {line}",
            "to activate it all the same: --force",
        )
    return f"{'older and' if is_older else 'forced, and'} worse: {line}" if found.is_worse else line


def _created(release: Release) -> str:
    """Gives when the release was built: ISO 8601 in UTC, which sorts as text."""
    return str(release.manifest.get("created", ""))

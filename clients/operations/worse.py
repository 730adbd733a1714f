"""Asks, before a release is activated, whether it is worse than the active one, and refuses it if it is.

Builds keep what each held-out user's list was worth (ensemble/release/held_out.py). Where both releases have
the same rows, their verified models are compared on them: what is served may have been refitted since, and
nobody can measure that on rows that it has learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ensemble.errors import ReleaseError
from ensemble.release.held_out import HELD_OUT, Comparison, compare, read_held_out
from ensemble.release.release import Release, open_release


def comparison(new: Release, active: Release) -> Comparison:
    """Compares the verified models of two releases on rows that neither had seen."""
    first, second = (read_held_out(release.path / HELD_OUT) for release in (active, new))
    for what, fact_of in (("are of two shops", _shop), ("held users out in two ways", _split)):
        one, other = fact_of(new), fact_of(active)
        if one != other and first is not None and second is not None:
            return Comparison(0, why_not=f"they {what}, {one!r} and {other!r}")
    return compare(first, second, same_worth=_measure(new) == _measure(active))


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


def _report(release: Release) -> Mapping[str, Any]:
    """Gives what the release's build measured; empty where its manifest has none of it."""
    return release.manifest.get("report") or {}


def _split(release: Release) -> str:
    """Names how the release's build held users out."""
    return str((_report(release).get("held_out") or {}).get("split", ""))


def _measure(release: Release) -> str:
    """Says how the release's build measured what lists are worth; empty where it did not."""
    return str((_report(release).get("worth") or {}).get("measure", ""))


def _shop(release: Release) -> str:
    """Names the shop that the release is of."""
    return str(release.manifest.get("shop", ""))


def _created(release: Release) -> str:
    """Gives when the release was built: ISO 8601 in UTC, which sorts as text."""
    return str(release.manifest.get("created", ""))

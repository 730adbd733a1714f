"""Compares two releases by what their builds kept of held-out users (ensemble/release/held_out.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ensemble.release.held_out import HELD_OUT, Comparison, compare, read_held_out
from ensemble.release.release import Release


def comparison(new: Release, active: Release) -> Comparison:
    """Compares the verified models of two releases on rows that neither had seen."""
    first, second = (read_held_out(release.path / HELD_OUT) for release in (active, new))
    for what, fact_of in (("are of two shops", _shop), ("held users out in two ways", _split)):
        one, other = fact_of(new), fact_of(active)
        if one != other and first is not None and second is not None:
            return Comparison(0, why_not=f"they {what}, {one!r} and {other!r}")
    return compare(first, second, same_worth=_measure(new) == _measure(active))


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

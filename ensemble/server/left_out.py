"""Keeps in a server's state folder which canary it does without, though the home's route has it.

A server that may only read its home cannot take a canary out for all. It can spare its own callers: it
answers all users by the main release until somebody changes the route.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from ensemble.release.files import write_durably
from ensemble.release.route import Route, Share

FILE = "left_out.json"


def may_change(home: Path) -> bool:
    """Says whether this process may write the route of a home."""
    return os.access(home, os.W_OK)


def leave_out(state: Path, route: Route) -> None:
    """Writes down that the canary of this route, and of no later one, is not served from here."""
    write_durably(state / FILE, json.dumps(_name(route)) + "\n")


def without_left_out(state: Path, route: Route) -> Route:
    """Gives the route that a server serves: the home's, without the canary that it does without."""
    if route.canary is None:
        return route
    try:
        left_out = json.loads((state / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return route
    return dataclasses.replace(route, shares=(Share(route.main, 1.0),)) if left_out == _name(route) else route


def _name(route: Route) -> dict[str, object]:
    """Names a route among all that its home ever has."""
    return {"sequence": route.sequence, "salt": route.salt, "releases": list(route.releases)}

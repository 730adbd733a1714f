"""Warns, before the route changes, where the servers' Redis has no rows of the release to come."""

from __future__ import annotations

import json
from pathlib import Path

from ensemble.errors import PeregrineError
from ensemble.progress import say
from ensemble.release.release import Release
from ensemble.server.group import Group
from ensemble.server.installation import TIERS
from ensemble.server.running import RunningServer
from ensemble.tiers.loaded import rows_missing
from ensemble.tiers.settings import TierSettings


def warn_of_missing_rows(servers: Group, release: Release) -> None:
    """Says it on stderr, a line for each Redis: what follows takes seconds, in which it can be stopped."""
    urls = dict.fromkeys(_redis_of(one.control.server) for one in servers.servers)
    for url in filter(None, urls):
        if missing := rows_missing(release, url):
            say(f"warning: {missing}")


def _redis_of(server: RunningServer) -> str:
    """Gives the URL of a server's Redis, which stands in its state folder for our user alone; "" where it has
    none, or that cannot be read."""
    if not server.has_redis:
        return ""
    try:
        return TierSettings(**json.loads((Path(server.state) / TIERS).read_text(encoding="utf-8"))).url
    except (OSError, ValueError, TypeError, PeregrineError):
        return ""

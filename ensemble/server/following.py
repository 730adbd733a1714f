"""Makes a server follow the route of its home, which commands and other servers' commands change.

A command turns every server that it can reach itself; this is for those that it cannot: of another user, in
another container, or while their tritonserver was away.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ensemble.errors import PeregrineError, ReleaseError
from ensemble.live.items import wait_for_changes
from ensemble.release.release import active_release, open_release
from ensemble.release.route import Route, Share, read_route
from ensemble.server.control import Control
from ensemble.server.left_out import without_left_out
from ensemble.server.mount import Busy
from ensemble.server.prepared import mount_of
from ensemble.server.running import RunningServer
from ensemble.server.turning import Turning

_LOOKS_S, _CHANGES_S = 0.25, 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0  # after a turn that failed, twice as long each time


def route_in(repository: Path, home: Path, fallback: str | None = None) -> Route | None:
    """Gives the route to serve: the home's; where none was written yet, all users are `fallback`'s or the
    alias's. None where there is neither."""
    route = read_route(home)
    if route is not None:
        return route
    name = fallback or active_release(repository, home)
    return None if name is None else Route((Share(name, 1.0),), "", 1)


class Follower:
    """Turns a server to its home's route whenever that says something else than what is served."""

    def __init__(
        self, server: RunningServer, repository: Path, fallback: str | None, log: Callable[[str], None]
    ) -> None:
        self._server, self._repository, self._fallback = server, repository, fallback
        self._home, self._state = Path(server.home), Path(server.state)
        self._log, self._mount = log, mount_of(server)
        self._tried: Route | None = None
        self._pause_s, self._next_s, self._said = 0.0, 0.0, ""

    def run(self, stopping: threading.Event, is_ready: Callable[[], bool]) -> None:
        """Looks again and again, until `stopping`; only while the server is ready."""
        while not stopping.wait(_LOOKS_S):
            if not is_ready():
                continue
            try:
                self._look()
            except (PeregrineError, OSError) as error:
                if is_ready() and not stopping.is_set():
                    self._complain(error)

    def _look(self) -> None:
        """Follows the route if it is another one, and it is time to try."""
        route = route_in(self._repository, self._home, self._fallback)
        route = None if route is None else without_left_out(self._state, route)
        if route is None or is_same(route, self._mount.route()):
            self._pause_s, self._said = 0.0, ""
            return
        if route == self._tried and time.monotonic() < self._next_s:
            return
        self._wait_for_changes(route)
        with contextlib.suppress(Busy), self._mount.turning(wait_s=0.0):  # a command may be at it
            if is_same(route, self._mount.route()):
                return
            if route != self._tried:
                self._tried, self._pause_s = route, 0.0
            with Control(self._server) as control:
                warning = Turning(control, self._repository).follow(route)
            self._log(f"the route of {self._home} is followed: {words(route)}")
            if warning:
                self._log(f"WARNING: {warning}")

    def _wait_for_changes(self, route: Route) -> None:
        """Waits until the releases that are to be loaded have all changes of items, which the home's writer
        sees to; ReleaseError if that takes too long."""
        for name in set(route.releases) - set(self._mount.route().releases):
            release = open_release(self._repository, name, self._home)
            if missing := wait_for_changes(release, _CHANGES_S):
                raise ReleaseError(missing)

    def _complain(self, error: Exception) -> None:
        """Logs why the route cannot be followed, once for each reason, and makes the next try wait."""
        self._pause_s = min(2 * self._pause_s or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._next_s = time.monotonic() + self._pause_s
        if str(error) != self._said:
            self._said = str(error)
            self._log(
                f"WARNING: the route of {self._home} cannot be followed: {error}; what is served goes on, "
                "and it is tried again"
            )


def is_same(one: Route, other: Route) -> bool:
    """Says whether two routes serve the same users by the same releases."""
    return one.shares == other.shares and (one.canary is None or one.salt == other.salt)


def words(route: Route) -> str:
    """Writes a route for people."""
    if route.canary is None:
        return f"release {route.main} is served"
    return ", ".join(f"release {one.release} is served to {one.share:.0%}" for one in route.shares)

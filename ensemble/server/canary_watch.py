"""Takes a canary out of the route by itself: when the guard says that it is worse, or its process dies."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ensemble.contract import PIPELINES
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release.repository import locked, put_route
from ensemble.release.route import Route, Share, next_route, read_route
from ensemble.server.group import group
from ensemble.server.guard import Guard, Limits, read_numbers
from ensemble.server.left_out import leave_out, may_change, without_left_out
from ensemble.server.router_files import router_of

EVERY_S, SHORT_EVERY_S = 1.0, 60.0


class CanaryWatch:
    """Watches the canary of a server's route, in a thread of its own: an abort waits for answers."""

    def __init__(
        self,
        repository: Path,
        home: Path,
        state: Path,
        log: Callable[[str], None],
        limits: Limits | None = None,
    ) -> None:
        self._repository, self._home, self._state, self._log = repository, home, state, log
        self._limits = limits
        self._guard: Guard | None = None
        self._dead = ""  # what died, since the canary began
        self._told_short_s = self._told_error_s = float("-inf")

    def start(self, stopping: threading.Event) -> threading.Thread:
        """Begins to look every second until `stopping` is set."""
        thread = threading.Thread(target=self._run, args=(stopping,), name="canary-watch", daemon=True)
        thread.start()
        return thread

    def _run(self, stopping: threading.Event) -> None:
        """Looks every second; whatever goes wrong, the next second looks again."""
        while not stopping.wait(EVERY_S):
            try:
                self.look()
            except Exception as error:
                if self._is_time("_told_error_s"):
                    reason = str(error) if isinstance(error, PeregrineError) else repr(error)
                    self._log(f"WARNING: the canary cannot be watched, or taken out: {reason}")

    def look(self) -> None:
        """Judges the canary once, if there is one, and takes it out if it is worse."""
        route = self._route()
        if route is None or route.canary is None:
            self._guard, self._dead = None, ""
            return
        if self._guard is None or self._guard.route != route:
            self._guard = Guard(route, self._limits)
            self._told_short_s = time.monotonic()
            self._log(f"canary {_words(route)}: it is watched")
        if why := self._dead or self._verdict(self._guard):
            self._take_out(route, why)

    def _verdict(self, guard: Guard) -> str:
        """Asks the guard; says now and then that there is not enough traffic."""
        numbers = read_numbers(self._state, guard.route)
        short = 0 if numbers is None else min(one.requests for one in numbers)
        if numbers is not None and not guard.is_short(*numbers):
            return guard.verdict(*numbers)
        if self._is_time("_told_short_s"):
            wanted = f"{short} of {guard.limits.minimum} requests to each release"
            self._log(f"canary {_words(guard.route)}: not enough traffic to judge it ({wanted}); it goes on")
        return ""

    def _is_time(self, clock: str) -> bool:
        """Says whether something was not said for a minute."""
        now = time.monotonic()
        if now - getattr(self, clock) < SHORT_EVERY_S:
            return False
        setattr(self, clock, now)
        return True

    def _route(self) -> Route | None:
        """Gives the home's route, as far as this server serves it."""
        route = read_route(self._home)
        return None if route is None else without_left_out(self._state, route)

    def _take_out(self, route: Route, why: str) -> None:
        """Gives all users to the main release, unless somebody has changed the route meanwhile."""
        if not may_change(self._home):
            self._leave_out(route, why)
            return
        with locked(self._home), group(self._repository, self._home) as servers:
            if read_route(self._home) != route:
                return
            turned = servers.abort(_by(why))
        warning = f"; {turned.warning}" if turned.warning else ""
        self._log(f"canary {_words(route)} is taken out, {route.main} answers all users: {why}{warning}")

    def _leave_out(self, route: Route, why: str) -> None:
        """Does without the canary here, where the route cannot be changed: the follower turns this server."""
        leave_out(self._state, route)
        self._log(
            f"WARNING: canary {_words(route)} is left out by this server, {route.main} answers its users: "
            f"{why}; {self._home} is read-only here, so that other servers go on with it: "
            "where it can be written, type `peregrine release abort`"
        )

    def is_tried(self, model: str) -> bool:
        """Says whether a model is the canary's, or the route's router: the main release does without."""
        try:
            route = self._route()
        except ReleaseError:
            return False
        if route is None or route.canary is None:
            return False
        return (
            model in [router_of(route, one) for one in PIPELINES]
            or model.partition("_")[0] == route.canary.release
        )

    def note_death(self, why: str) -> None:
        """Notes what became of the canary's processes or the router's, for the next look."""
        self._dead = why

    def take_out_on_disk(self, why: str) -> bool:
        """Gives all users to the main release where tritonserver is down; says whether there was a canary."""
        try:
            if (route := self._route()) is None or route.canary is None:
                return False
            if not may_change(self._home):
                self._leave_out(route, why)
                return True
            with locked(self._home):
                put_route(self._repository, next_route(route, [Share(route.main, 1.0)], _by(why)), self._home)
        except (PeregrineError, OSError) as error:
            self._log(f"WARNING: the canary cannot be taken out: {error}")
            return False
        self._log(f"canary {_words(route)} is taken out, {route.main} answers all users: {why}")
        return True


def _words(route: Route) -> str:
    """Names a route's canary and its share."""
    assert route.canary is not None
    return f"{route.canary.release} ({route.canary.share:.3g} of the users)"


def _by(why: str) -> str:
    """Says in the route who changed it."""
    return f"guard@{platform.node()}: {why.splitlines()[0]}"

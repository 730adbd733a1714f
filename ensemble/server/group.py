"""Turns all servers that follow one home together: every one loads and asks the next route's releases before
the first turns; finishes or undoes what a killed command left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import PeregrineError, ReleaseError
from ensemble.release import activation
from ensemble.release.repository import align_alias, put_route
from ensemble.release.route import FILE, Route, Share, next_route
from ensemble.server.calls import is_open
from ensemble.server.control import Control
from ensemble.server.following import route_in
from ensemble.server.prepared import mount_of
from ensemble.server.running import num_of_others, running_servers
from ensemble.server.turning import Turning

TURN_WAIT_S = 180.0  # for a server that is turning by itself


@dataclass(frozen=True)
class Turned:
    """Says what a turn took, and what went wrong after the alias had turned."""

    load_ms: float = 0.0
    flip_ms: float = 0.0
    warning: str = ""


class Group:
    """Holds the servers that follow a home and can be reached. Use it under the home's lock."""

    def __init__(self, repository: Path, home: Path, servers: Sequence[Turning], note: str) -> None:
        self.repository, self.home, self.servers = repository, home, servers
        self.note = note  # what to know of servers that could not be reached

    @property
    def route(self) -> Route | None:
        """Gives the home's route; where none was written yet, it is the active release's alone."""
        return route_in(self.repository, self.home)

    def turn(self, name: str) -> Turned:
        """Makes the servers answer with a release; ReleaseError on any fault, and the old one goes on."""
        return self.change([Share(name, 1.0)], activation.ACTIVATION)

    def abort(self, by: str = "") -> Turned:
        """Gives all users to the route's main release, which is loaded: nothing is asked before."""
        route = self.route
        shares = [Share(route.main, 1.0)] if route else []
        return self.change(shares, activation.ABORT, by, is_asked=False)

    def change(self, shares: Sequence[Share], what: str, by: str = "", *, is_asked: bool = True) -> Turned:
        """Makes the servers answer by these shares of releases; ReleaseError on any fault, and what was
        served goes on.

        What is begun is written down first, so that a killed change can be finished or undone.
        """
        before = self.route
        route = next_route(before, shares, by)
        started = activation.Started(what, route.shares, before.shares if before else ())
        activation.begin(self.home, started)
        try:
            load_ms = sum(server.load_beside(route, is_asked=is_asked) for server in self.servers)
            flip_ms = self._flip(route, before, is_asked=is_asked)
        except PeregrineError as error:
            for server in self.servers:
                server.withdraw(route, error)  # what is served is never unloaded
            activation.end(self.home)
            raise ReleaseError(f"{started.refusal}: {error}") from error
        warning = self._unload_others(route)
        activation.end(self.home)
        return Turned(load_ms, flip_ms, warning)

    def _flip(self, route: Route, before: Route | None, *, is_asked: bool) -> float:
        """Turns the route and every server to it, or back; gives the milliseconds of the calls.

        The files go first: a server that starts from now on agrees with those at work.
        """
        flip_ms, turned = 0.0, list[tuple[Turning, Route]]()
        self.write(route)
        try:
            for server in self.servers:
                turned.append((server, server.route))
                flip_ms += server.flip(route, is_asked=is_asked)
        except PeregrineError:
            back = next_route(route, before.shares) if before else None
            if back is not None:
                self.write(back)
            else:
                (self.home / FILE).unlink(missing_ok=True)
            for server, was in turned:
                with contextlib.suppress(PeregrineError):  # the first error is the one to tell
                    server.turn_back(back or was)
            raise
        return flip_ms

    def write(self, route: Route) -> None:
        """Writes the route down."""
        put_route(self.repository, route, self.home)

    def answers(self, route: Route) -> bool:
        """Says whether every server answers by the route already."""
        return all(server.answers(route) for server in self.servers)

    def _unload_others(self, route: Route) -> str:
        """Unloads from every server what the route does not need; gives what went wrong first."""
        return next(filter(None, [server.unload_others(route) for server in self.servers]), "")

    def settle(self) -> str:
        """Finishes or undoes a change that was killed; says which, or nothing if there was none.

        The servers are made to agree with the route on disk; if they cannot, with the other of the two.
        """
        if not self.servers:
            return activation.settle_on_disk(self.repository, self.home)
        align_alias(self.repository, self.home)
        started = activation.unfinished(self.home)
        if started is None:
            return ""
        route = self.route
        if route is not None and not self.answers(route):
            other = started.before if route.shares == started.after else started.after
            self._return_to([route.shares, *([other] if other else [])])
        route = self.route
        warning = self._unload_others(route) if route else ""
        said = activation.outcome(self.repository, started, self.home)
        activation.end(self.home)
        return f"{said}; {warning}" if warning else said

    def _return_to(self, choices: list[tuple[Share, ...]]) -> None:
        """Turns route and servers to the first of these with which every one answers; ReleaseError if there
        is none."""
        errors = []
        for shares in choices:
            route = next_route(self.route, shares)
            try:
                self.write(route)
                for server in self.servers:
                    server.return_to(route)
                return
            except PeregrineError as error:
                errors.append(f"{', '.join(route.releases)}: {error}")
        raise ReleaseError(
            f"an activation was killed, and neither release answers: {'; '.join(errors)}",
            "restart `peregrine serve`",
        )


@contextlib.contextmanager
def group(repository: Path, home: Path) -> Iterator[Group]:
    """Gives the servers that follow a home, and keeps them from turning by themselves meanwhile."""
    servers, unreached = [], num_of_others(home)
    with contextlib.ExitStack() as stack:
        for server in running_servers(repository, home):
            if not is_open(server.url):  # tritonserver is being started: it follows afterwards
                unreached += 1
                continue
            stack.enter_context(mount_of(server).turning(TURN_WAIT_S))
            servers.append(Turning(stack.enter_context(Control(server)), repository))
        note = f"servers that cannot be reached from here, and follow by themselves: {unreached}"
        yield Group(repository, home, servers, note if unreached else "")

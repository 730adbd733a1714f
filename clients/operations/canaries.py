"""Tries a release on a small share of users, gives it all of them, or takes it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.items import make_ready
from clients.operations.listing import check_repository
from clients.operations.releases import disk_errors, show, told, try_out
from ensemble.errors import InvalidInput
from ensemble.release import activation, foreign
from ensemble.release.activation import settle_on_disk
from ensemble.release.release import Release, open_release
from ensemble.release.repository import locked, put_route, require_active
from ensemble.release.route import Route, Share, next_route
from ensemble.server.control import Control
from ensemble.server.options import check_requirement
from ensemble.server.prepared import prepare_release
from ensemble.server.router_files import check_same
from ensemble.server.running import running_server
from ensemble.server.turning import Turned, Turning, current_route


@dataclass(frozen=True)
class Change:
    """Says what a change of the route did."""

    release: str  # that is tried, has all users now, or has none any more
    share: float  # of users that it has now
    main: str  # who answers the others
    served: bool  # a running server answers so now
    load_ms: float = 0.0
    flip_ms: float = 0.0
    warning: str = ""
    notes: tuple[str, ...] = ()


def canary(repository: Path, name: str, share: float, require: str | None = None) -> Change:
    """Gives release `name` a share of the users, above 0 and below 1, or another one than it has; the active
    release keeps the others.

    It is asked for real users' lists before, as an activated one is. While it is tried, `serve` watches it.
    """
    check_requirement(require)
    if not 0 < share < 1:
        raise InvalidInput(
            f"--share {share * 100:g}: a canary has more than 0% and less than 100% of the users"
        )
    show(repository, name)
    release = open_release(repository, name)
    release.verify()
    foreign.check_release(release)
    with _at_work(repository) as (turning, settled):
        route = _route(repository)
        if name == route.main:
            raise InvalidInput(f"release {name} is active: it has the users already")
        if route.canary is not None and name != route.canary.release:
            raise InvalidInput(
                f"release {route.canary.release} is tried already: promote or abort it before another one"
            )
        check_same(repository, (route.main, name))
        note = _prepared(repository, turning, release, require)
        shares = [Share(route.main, 1.0 - share), Share(name, share)]
        turned = _turned(repository, turning, shares, activation.CANARY)
        return _change(name, shares, turned, settled, note)


def promote(repository: Path, require: str | None = None) -> Change:
    """Gives the release that is tried all users."""
    check_requirement(require)
    with _at_work(repository) as (turning, settled):
        name = _tried(_route(repository))
        note = _prepared(repository, turning, open_release(repository, name), require)
        shares = [Share(name, 1.0)]
        turned = _turned(repository, turning, shares, activation.PROMOTION)
        return _change(name, shares, turned, settled, note)


def abort(repository: Path) -> Change:
    """Takes the release that is tried out: the main one answers all users."""
    with _at_work(repository) as (turning, settled):
        route = _route(repository)
        name, shares = _tried(route), [Share(route.main, 1.0)]
        turned = turning.abort() if turning else _turned(repository, None, shares, activation.ABORT)
        return _change(name, shares, turned, settled)


@contextlib.contextmanager
def _at_work(repository: Path) -> Iterator[tuple[Turning | None, str]]:
    """Holds the lock and the server at work, if there is one, and ends what was killed: says what became of
    it."""
    check_repository(repository)
    with disk_errors(repository), locked(repository):
        server = running_server(repository)
        if server is None:
            yield None, settle_on_disk(repository)
            return
        with Control(server) as control:
            turning = Turning(control, repository)
            yield turning, turning.settle()


def _prepared(repository: Path, turning: Turning | None, release: Release, require: str | None) -> str:
    """Mounts a release in the server at work, asks it in a process of its own if it is not in the route, and
    waits until it knows all items; gives what it runs on if that is less than could be."""
    route = _route(repository)
    if turning is None and require is not None:
        raise InvalidInput(f"--require {require}: no server is at work on {repository}, which could tell")
    is_new, note = release.name not in route.releases, ""
    if turning is not None:
        note = prepare_release(turning.control.server, release, require, is_loaded=not is_new)
    if is_new:
        try_out(release, route.main)
    if turning is not None:
        make_ready(repository, release.name)
    return note


def _turned(repository: Path, turning: Turning | None, shares: Sequence[Share], what: str) -> Turned | None:
    """Changes the route, in the server at work or on disk alone."""
    if turning is not None:
        return turning.change(shares, what)
    put_route(repository, next_route(current_route(repository), shares))
    return None


def _change(name: str, shares: Sequence[Share], turned: Turned | None, *notes: str) -> Change:
    """Says what was done."""
    share = next((one.share for one in shares if one.release == name), 0.0)
    done = turned or Turned()
    served = turned is not None
    return Change(
        name, share, shares[0].release, served, done.load_ms, done.flip_ms, done.warning, told(*notes)
    )


def _route(repository: Path) -> Route:
    """Gives the route; ReleaseError where nothing is active."""
    require_active(repository)
    route = current_route(repository)
    assert route is not None
    return route


def _tried(route: Route) -> str:
    """Names the release that is tried; InvalidInput if there is none."""
    if route.canary is None:
        raise InvalidInput(
            f"no release is tried: {route.main} has all users",
            "peregrine release canary NAME --share PERCENT",
        )
    return route.canary.release

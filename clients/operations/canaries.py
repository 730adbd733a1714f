"""Tries a release on a small share of users, gives it all of them, or takes it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.items import make_ready
from clients.operations.listing import check_repository
from clients.operations.releases import disk_errors, show, told, try_out
from clients.operations.rows import warn_of_missing_rows
from clients.operations.worse import refuse_worse
from ensemble.errors import InvalidInput
from ensemble.release import activation, foreign
from ensemble.release.release import Release, open_release
from ensemble.release.repository import locked, require_active
from ensemble.release.route import Route, Share
from ensemble.server.group import Group, Turned, group
from ensemble.server.options import check_requirement
from ensemble.server.router_files import check_same


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


def canary(
    repository: Path, name: str, share: float, require: str | None = None, home: Path | None = None
) -> Change:
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
    with _at_work(repository, home) as (servers, settled):
        route = _route(servers)
        if name == route.main:
            raise InvalidInput(f"release {name} is active: it has the users already")
        if route.canary is not None and name != route.canary.release:
            raise InvalidInput(
                f"release {route.canary.release} is tried already: promote or abort it before another one"
            )
        check_same(repository, (route.main, name))
        notes = _prepared(servers, release, require)
        shares = [Share(route.main, 1.0 - share), Share(name, share)]
        turned = servers.change(shares, activation.CANARY)
        return _change(name, shares, servers, turned, settled, *notes)


def promote(
    repository: Path, require: str | None = None, home: Path | None = None, *, force: bool = False
) -> Change:
    """Gives the release that is tried all users; one that was worth less than the main one to held-out users
    is refused, unless `force`, as activation does."""
    check_requirement(require)
    with _at_work(repository, home) as (servers, settled):
        route = _route(servers)
        name = _tried(route)
        release = open_release(repository, name)
        worth = refuse_worse(release, route.main, force=force)
        notes = _prepared(servers, release, require)
        shares = [Share(name, 1.0)]
        turned = servers.change(shares, activation.PROMOTION)
        return _change(name, shares, servers, turned, settled, worth, *notes)


def abort(repository: Path, home: Path | None = None) -> Change:
    """Takes the release that is tried out: the main one answers all users."""
    with _at_work(repository, home) as (servers, settled):
        route = _route(servers)
        return _change(_tried(route), [Share(route.main, 1.0)], servers, servers.abort(), settled)


@contextlib.contextmanager
def _at_work(repository: Path, home: Path | None) -> Iterator[tuple[Group, str]]:
    """Holds the home's lock and the servers at work, and ends what was killed: says what became of it."""
    check_repository(repository)
    repository, home = repository.resolve(), (home or repository).resolve()
    with disk_errors(home), locked(home), group(repository, home) as servers:
        yield servers, servers.settle()


def _prepared(servers: Group, release: Release, require: str | None) -> list[str]:
    """Mounts a release in the servers at work, asks it in a process of its own if it is not in the route, and
    waits until it knows all items; gives what it runs on if that is less than could be."""
    route = _route(servers)
    warn_of_missing_rows(servers, release)
    if not servers.servers and require is not None:
        raise InvalidInput(
            f"--require {require}: no server is at work on {servers.repository}, which could tell"
        )
    notes = [server.prepare(release.name, require) for server in servers.servers]
    if release.name not in route.releases:
        try_out(release, route.main)
    if servers.servers:
        make_ready(servers.repository, release.name, servers.home)
    return notes


def _change(name: str, shares: Sequence[Share], servers: Group, done: Turned, *notes: str) -> Change:
    """Says what was done."""
    return Change(
        name,
        next((one.share for one in shares if one.release == name), 0.0),
        shares[0].release,
        bool(servers.servers),
        done.load_ms,
        done.flip_ms,
        done.warning,
        told(*notes, servers.note),
    )


def _route(servers: Group) -> Route:
    """Gives the route; ReleaseError where nothing is active."""
    require_active(servers.repository, servers.home)
    route = servers.route
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

"""Shows, activates and removes releases of a repository, whether or not a server is at work on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.items import make_ready
from clients.operations.listing import check_repository
from clients.operations.rows import warn_of_missing_rows
from clients.operations.worse import refuse_worse
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release import foreign
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import check_name, release_names
from ensemble.release.release import Release, open_release
from ensemble.release.repository import locked
from ensemble.release.repository import remove as remove_files
from ensemble.release.route import Share, next_route
from ensemble.server.control import Control
from ensemble.server.group import TURN_WAIT_S, Group, group
from ensemble.server.options import check_requirement
from ensemble.server.prepared import mount_of
from ensemble.server.running import running_servers
from ensemble.server.twin import ask_twin


@dataclass(frozen=True)
class Activation:
    """Says what an activation did."""

    release: str
    previous: str | None
    served: bool  # a running server answers with it now
    load_ms: float = 0.0  # loading and asking the release's models, beside the old ones
    flip_ms: float = 0.0  # the call that turns the alias
    warning: str = ""  # what went wrong after the alias had turned; the release is served all the same
    worth: str = ""  # how it does beside the one that was active, or why that cannot be told
    notes: tuple[str, ...] = ()  # what to know: what it runs on instead of TensorRT, what was finished before


def show(repository: Path, name: str) -> dict[str, Any]:
    """Reads the manifest of release `name`; ReleaseError if there is none."""
    check_repository(repository)
    try:
        return read_manifest(repository / check_name(name) / MANIFEST)
    except FileNotFoundError:
        there = ", ".join(release_names(repository)) or "none"
        raise ReleaseError(f"no release {name!r} in {repository}; there are: {there}") from None


def activate(
    repository: Path,
    name: str,
    require: str | None = None,
    home: Path | None = None,
    *,
    force: bool = False,
) -> Activation:
    """Makes release `name` the one that `recommend` answers with; on any fault the old one stays, on disk and
    in every server.

    It is asked for real users' lists before: in a process of its own, in the servers, and through the alias.
    One that was worth less than the active one to users whom neither had seen is refused, unless `force`.
    `require` names what the servers must run engines on (ensemble.engines.ENGINES); the route lies in `home`,
    which is the repository if not given.
    """
    check_requirement(require)
    show(repository, name)
    repository, home = repository.resolve(), (home or repository).resolve()
    release = open_release(repository, name, home)
    release.verify()
    foreign.check_release(release)
    with disk_errors(home), locked(home), group(repository, home) as servers:
        if servers.servers:
            return _activate_in(servers, release, require, force)
        return _activate_on_disk(servers, release, require, force)


def remove(repository: Path, name: str, home: Path | None = None) -> None:
    """Removes a release that is not active, or what there is of half a copy; ReleaseError if it is served, by
    servers of another home too."""
    check_repository(repository)
    repository, home = repository.resolve(), (home or repository).resolve()
    with disk_errors(repository):
        settle(repository, home)

        def unload() -> None:
            """Takes the release out of the servers at work, if there are any."""
            for server in running_servers(repository):
                mount = mount_of(server)
                if name in mount.route().releases:
                    raise ReleaseError(
                        f"release {name} is served at {server.url}, whose route is that of {server.home}",
                        "activate another one there",
                    )
                with mount.turning(TURN_WAIT_S), Control(server) as control:
                    control.unload_release(name)
                    mount.remove(name)

        remove_files(repository, name, unload, home)


def settle(repository: Path, home: Path | None = None) -> str:
    """Finishes or undoes an activation that was killed; says which, or nothing if there was none."""
    home = home or repository
    with locked(home), group(repository, home) as servers:
        return servers.settle()


def _activate_on_disk(servers: Group, release: Release, require: str | None, force: bool) -> Activation:
    """Turns the route where no server can be reached."""
    if require is not None:
        raise InvalidInput(
            f"--require {require}: no server is at work on {servers.repository}, which alone could tell; "
            "give it to `peregrine serve`"
        )
    settled, route = servers.settle(), servers.route
    previous = route.main if route else None
    worth = refuse_worse(release, previous, force=force)
    try_out(release, previous)
    servers.write(next_route(route, [Share(release.name, 1.0)]))
    return Activation(release.name, previous, served=False, worth=worth, notes=told(settled, servers.note))


def _activate_in(servers: Group, release: Release, require: str | None, force: bool) -> Activation:
    """Turns the servers at work; the release that they answer with already is only asked."""
    settled, name, route = servers.settle(), release.name, servers.route
    previous = route.main if route else None
    worth = refuse_worse(release, previous, force=force)
    warn_of_missing_rows(servers, release)
    notes = told(settled, *(server.prepare(name, require) for server in servers.servers), servers.note)
    if route is not None and route.releases == (name,) and servers.answers(route):
        return Activation(name, previous, served=True, notes=notes)
    if name != previous:
        try_out(release, previous)
    make_ready(servers.repository, name, servers.home)
    turned = servers.turn(name)
    times = turned.load_ms, turned.flip_ms
    return Activation(name, previous, True, *times, turned.warning, worth, notes)


def try_out(release: Release, previous: str | None) -> None:
    """Asks the release in a process of its own; ReleaseError that says which release goes on."""
    try:
        ask_twin(release)
    except ReleaseError as error:
        goes_on = "" if previous == release.name else f", {previous or 'no release'} goes on"
        raise ReleaseError(f"release {release.name} is not activated{goes_on}: {error}") from error


def told(*notes: str) -> tuple[str, ...]:
    """Gives the notes that say something, each once."""
    return tuple(dict.fromkeys(filter(None, notes)))


@contextlib.contextmanager
def disk_errors(repository: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        raise ReleaseError(
            f"cannot write into {repository}: {error.strerror or error} ({error.filename or 'no file'})",
            "free some space or make it writable, and try again",
        ) from error

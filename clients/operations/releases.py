"""Shows, activates and removes releases of a repository, whether or not a server is at work on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.items import make_ready
from clients.operations.listing import check_repository
from clients.operations.worse import refuse_worse
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release import foreign
from ensemble.release.activation import settle_on_disk
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import check_name, release_names
from ensemble.release.release import Release, active_release, open_release
from ensemble.release.repository import locked, put_route
from ensemble.release.repository import remove as remove_files
from ensemble.release.route import Share, next_route, read_route
from ensemble.server.control import Control
from ensemble.server.options import check_requirement
from ensemble.server.prepared import mount_of, prepare_release
from ensemble.server.running import RunningServer, running_server
from ensemble.server.turning import Turning, current_route
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


def activate(repository: Path, name: str, require: str | None = None, *, force: bool = False) -> Activation:
    """Makes release `name` the one that `recommend` answers with; on any fault the old one stays, on disk and
    in the server.

    It is asked for real users' lists before: in a process of its own, in the server, and through the alias.
    One that was worth less than the active one to users whom neither had seen is refused, unless `force`.
    `require` names what the server must run its engines on (ensemble.engines.ENGINES).
    """
    check_requirement(require)
    show(repository, name)
    release = open_release(repository, name)
    release.verify()
    foreign.check_release(release)
    with disk_errors(repository), locked(repository):
        server = running_server(repository)
        if server is None:
            return _activate_on_disk(repository, release, require, force)
        with Control(server) as control:
            return _activate_in(Turning(control, repository), server, release, require, force)


def remove(repository: Path, name: str) -> None:
    """Removes a release that is not active, or the parts of one, from the server and from disk."""
    check_repository(repository)
    with disk_errors(repository):
        settle(repository)

        def unload() -> None:
            """Takes the release out of the server at work, if there is one."""
            server = running_server(repository)
            if server is not None:
                with Control(server) as control:
                    control.unload_release(name)
                mount_of(server).remove(name)

        remove_files(repository, name, unload)


def settle(repository: Path) -> str:
    """Finishes or undoes an activation that was killed; says which, or nothing if there was none."""
    with locked(repository):
        server = running_server(repository)
        if server is None:
            return settle_on_disk(repository)
        with Control(server) as control:
            return Turning(control, repository).settle()


def _activate_on_disk(repository: Path, release: Release, require: str | None, force: bool) -> Activation:
    """Turns the alias where no server is running."""
    if require is not None:
        raise InvalidInput(
            f"--require {require}: no server is at work on {repository}, which alone could tell; give it to "
            "`peregrine serve`"
        )
    settled, previous = settle_on_disk(repository), active_release(repository)
    worth = refuse_worse(release, previous, force=force)
    try_out(release, previous)
    put_route(repository, next_route(read_route(repository), [Share(release.name, 1.0)]))
    return Activation(release.name, previous, served=False, worth=worth, notes=told(settled))


def _activate_in(
    turning: Turning, server: RunningServer, release: Release, require: str | None, force: bool
) -> Activation:
    """Turns the server at work; the release that it answers with already is only asked."""
    settled, name = turning.settle(), release.name
    route = current_route(turning.repository)
    previous = route.main if route else None
    worth = refuse_worse(release, previous, force=force)
    note = prepare_release(server, release, require, is_loaded=route is not None and name in route.releases)
    if route is not None and route.releases == (name,) and turning.answers(route):
        return Activation(name, previous, served=True, notes=told(settled, note))
    if name != previous:
        try_out(release, previous)
    make_ready(turning.repository, name)
    turned = turning.turn(name)
    times, notes = (turned.load_ms, turned.flip_ms), told(settled, note)
    return Activation(name, previous, True, *times, turned.warning, worth, notes)


def try_out(release: Release, previous: str | None) -> None:
    """Asks the release in a process of its own; ReleaseError that says which release goes on."""
    try:
        ask_twin(release)
    except ReleaseError as error:
        goes_on = "" if previous == release.name else f", {previous or 'no release'} goes on"
        raise ReleaseError(f"release {release.name} is not activated{goes_on}: {error}") from error


def told(*notes: str) -> tuple[str, ...]:
    """Gives the notes that say something."""
    return tuple(filter(None, notes))


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

"""Mounts all that a route needs before a tritonserver starts: its releases, what splits users, the alias."""

from __future__ import annotations

from pathlib import Path

from ensemble.engines.plans import Plan, find_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release, open_release
from ensemble.release.route import Route
from ensemble.server.mount import Mount
from ensemble.server.router_files import alias_texts, write_routers
from ensemble.server.runtime import Runtime


def mount_route(mount: Mount, repository: Path, route: Route, runtime: Runtime, *, is_fused: bool) -> None:
    """Mounts the releases of a route that are not, its router, and points the alias; ReleaseError says what
    cannot be."""
    for name in route.releases:
        release = open_release(repository, name)
        if not mount.has(release):
            release.verify()
            mount.add(release, _plans(release, runtime))
    write_routers(mount.folder, repository, route, fused=is_fused, instances=mount.instances)
    mount.point(route, alias_texts(repository, route))


def _plans(release: Release, runtime: Runtime) -> tuple[Plan, ...]:
    """Finds a release's plans where the server runs plans in Triton's own backend; without fitting ones it
    runs on what the engine steps run on."""
    if not runtime.plans or runtime.node is None:
        return ()
    try:
        return tuple(find_plans(release, runtime.node).values())
    except ReleaseError:
        return ()

"""Prepares a running server for a release that is about to be loaded: finds its plans and links them in.

What a server runs engines on is decided when it starts (runtime.py); whether the next release can run on that
is decided here, before it is loaded.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ensemble.engines.flavors import FLAVORS, TENSORRT, TITLES
from ensemble.engines.plans import Node, Plan, find_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release
from ensemble.release.repository import member_folders
from ensemble.server.running import RunningServer
from ensemble.server.runtime import has_plans, mount, unmount

_TRIES = 5


def prepare_release(
    server: RunningServer, release: Release, require: str | None, *, is_loaded: bool = False
) -> str:
    """Makes the running server load a release's plans, if it runs plans and there are fitting ones; one that
    is loaded stays as it is.

    Gives what the release will run on instead, and why, if that is less than the server could; empty if it is
    not. ReleaseError if it is not what is required, or the engine steps cannot do without plans.
    """
    require, plans, why = require or server.require, tuple[Plan, ...](), ""
    if server.has_plans or server.engine in FLAVORS:
        try:
            plans = _plans_for(server, release, is_loaded=is_loaded)
        except ReleaseError as error:
            why = str(error)
    runs_on = TENSORRT if server.has_plans and plans else server.engine
    if why and not server.has_plans:
        asked = f"--require {require}: " if require else ""
        raise ReleaseError(f"{asked}the server at work runs plans in its engine steps, and {why}")
    if require is not None and require != runs_on:
        raise ReleaseError(f"--require {require}: {why or f'the server at work runs engines on {runs_on}'}")
    if server.overlay and not is_loaded:
        _mount(server, release, plans)
    if why:
        return f"release {release.name} runs on {runs_on} instead of {TITLES[TENSORRT]}: {why}"
    if runs_on not in FLAVORS and require is None and has_plans(release):
        return (
            f"release {release.name} has plans, and the server at work runs engines on {runs_on}: start "
            "`peregrine serve` again where they shall be used"
        )
    return ""


def _plans_for(server: RunningServer, release: Release, *, is_loaded: bool) -> tuple[Plan, ...]:
    """Finds a release's plans for the running server; ReleaseError says why it cannot, or does not, run
    them."""
    from ensemble.engines.tensorrt import this_node

    flavor = server.engine if server.engine in FLAVORS else TENSORRT
    node = Node(**server.node) if server.node else this_node(flavor)
    plans = tuple(find_plans(release, node).values())
    if server.has_plans and not server.takes_portable and any(plan.key.portable for plan in plans):
        raise ReleaseError(
            "the server at work was started without portable plans, which need a flag of Triton",
            "start `peregrine serve` again",
        )
    for plan in plans if server.has_plans and is_loaded else ():
        if not _is_link(Path(server.overlay) / plan.member, plan.member_folder):
            raise ReleaseError(
                f"{plan.member} is loaded without its plan",
                "activate another release and this one again, or start `peregrine serve` again",
            )
    return plans


def _mount(server: RunningServer, release: Release, plans: tuple[Plan, ...]) -> None:
    """Mounts a release that is not loaded in the folder that Triton reads: models with a plan from there.

    The server mounts new releases by itself, every second and without plans: so this looks again.
    """
    planned = {plan.member: plan.member_folder for plan in plans}
    for path in (release.path, *member_folders(release.repository, release.name)):
        link, target = Path(server.overlay) / path.name, planned.get(path.name, path)
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                if link.is_dir() and not _is_mounted(link, target):
                    unmount(link)
                if not link.is_dir():
                    link.unlink(missing_ok=True)
                    mount(target, link, server.instances)
            if _is_mounted(link, target):
                break
        else:
            raise ReleaseError(f"{link} cannot be linked to {target}", "start `peregrine serve` again")


def _is_mounted(link: Path, target: Path) -> bool:
    """Says whether a folder is mounted: as a link to it, or as links to its files."""
    return _is_link(link, target) or (
        not link.is_symlink()
        and (link / "1").is_dir()
        and any(_is_link(path, target / path.relative_to(link)) for path in link.glob("1/*"))
    )


def _is_link(link: Path, target: Path) -> bool:
    """Says whether `link` is one to `target`."""
    return link.is_symlink() and link.readlink() == target

"""Prepares a running server for a release that is about to be loaded: finds its plans and mounts it.

What a server runs engines on is decided when it starts (runtime.py); whether the next release can run on that
is decided here, before it is loaded.
"""

from __future__ import annotations

from pathlib import Path

from ensemble.engines.flavors import FLAVORS, TENSORRT, TITLES
from ensemble.engines.plans import Node, Plan, find_plans
from ensemble.errors import ReleaseError
from ensemble.release.release import Release
from ensemble.server.mount import Mount
from ensemble.server.running import RunningServer
from ensemble.server.runtime import has_plans


def mount_of(server: RunningServer) -> Mount:
    """Gives the mount of a running server."""
    return Mount(Path(server.state), server.instances, server.num_gpus)


def prepare_release(
    server: RunningServer, release: Release, require: str | None, *, is_loaded: bool = False
) -> str:
    """Mounts a release for the running server, with its plans if that runs plans and there are fitting ones;
    one that is loaded stays as it is.

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
    if not is_loaded or not mount_of(server).has(release):
        mount_of(server).add(release, plans if server.has_plans else ())
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
        if not mount_of(server).has_plan(plan):
            raise ReleaseError(
                f"{plan.member} is loaded without its plan",
                "activate another release and this one again, or start `peregrine serve` again",
            )
    return plans

"""Checks what must be right on this machine before tritonserver starts; each wrong thing is one line with its
cure."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from ensemble.engines import GPU
from ensemble.engines.cards import show_cards
from ensemble.errors import InvalidInput, ReleaseError, ServerError
from ensemble.release.activation import settle_on_disk
from ensemble.release.release import Release, open_release
from ensemble.release.repository import locked, require_active, require_folder, sweep
from ensemble.release.route import read_route
from ensemble.release.shared_memory import shm_bytes
from ensemble.server.installation import SHM, Installation
from ensemble.server.options import ServeOptions
from ensemble.server.running import running_servers
from ensemble.tiers.connection import check_installed
from ensemble.tracing import check_tracing


def check_user(as_root: bool) -> None:
    """Raises ServerError where root would serve without saying so.

    Tritonserver takes the secret of its control calls by its command line alone, which every local user can
    read, and such a call brings code to run.
    """
    if os.geteuid() == 0 and not as_root:
        raise ServerError(
            "serve does not run as root: every local user can read the server's control secret in the list "
            "of processes, and with it run code as the server's user",
            "use an ordinary user; or, on single-tenant hosts only, --as-root (PEREGRINE_AS_ROOT=1)",
        )


def check_packages(options: ServeOptions) -> None:
    """Raises an error that names the package or device that the options need and this machine lacks; from
    here on this process sees the GPUs that it is to use."""
    if options.redis is not None:
        check_installed()
    if options.traces is not None and options.fused:
        check_tracing()
    if options.gpus is not None:
        show_cards(options.gpus)
    if options.index == GPU:
        from ensemble.index.gpu_index import check_gpu

        check_gpu()


def check_servable(
    repository: Path, log: Callable[[str], None], home: Path | None = None, named: str | None = None
) -> str:
    """Gives the active release's name after comparing every file with the manifest; ReleaseError says the
    cure. `log` hears what old leftovers are removed.

    The route lies in `home`, which is the repository if not given; where there is none, `named` is served.
    """
    home = home or repository
    require_folder(repository)
    if not home.is_dir():
        raise InvalidInput(f"--catalogue {home} does not exist", "make the folder, or leave --catalogue out")
    if os.access(repository, os.W_OK):
        sweep(repository, log, home=home)
    if os.access(home, os.W_OK):
        _settle(repository, home, log)
    name = _name_to_serve(repository, home, named)
    if not (repository / name / "manifest.json").exists():
        raise ReleaseError(
            f"release {name} is incomplete: {repository / name / 'manifest.json'} is missing; activate "
            "another release or build again"
        )
    open_release(repository, name).verify()
    return name


def _name_to_serve(repository: Path, home: Path, named: str | None) -> str:
    """Gives the release that the route names, or the one that was named where no route is written."""
    if named is None:
        return require_active(repository, home)
    route = read_route(home)
    if route is not None and route.main != named:
        raise InvalidInput(
            f"--route {named}: {home} has a route, which servers follow: release {route.main} is active",
            f"leave --route out, or peregrine release activate {named}",
        )
    return named


def _settle(repository: Path, home: Path, log: Callable[[str], None]) -> None:
    """Ends an activation that was killed; where a server is at work already, that is not ours to do."""
    with locked(home):
        if not running_servers(repository, home) and (said := settle_on_disk(repository, home)):
            log(said)


def warn_of_shared_memory(release: Release, options: ServeOptions, log: Callable[[str], None]) -> None:
    """Logs a warning where /dev/shm has less room than the release may take: a container's 64 MiB, often."""
    need = shm_bytes(release.schema, fused=options.fused, instances=options.instances) >> 20
    try:
        free = shutil.disk_usage(SHM).free >> 20
    except OSError:  # Triton's Python backend does not start then, and says why
        return
    if free < need:
        log(
            f"WARNING: {SHM} has {free} MiB free, and release {release.name} may take {need}: where it is "
            f"full requests fail; make it larger (compose's SHM={need}m, a pod's volume `shm`, docker run "
            f"--shm-size {need}m), or serve with fewer --instances"
        )


def check_address(options: ServeOptions, installation: Installation) -> None:
    """Raises ServerError where a tritonserver with known holes would be reachable from other machines."""
    level = installation.level
    if not options.is_loopback and not (level and level.may_leave_loopback):
        raise ServerError(
            f"address {options.address} refused: tritonserver {level or 'of unknown version'} has known "
            "holes and must stay on 127.0.0.1; 2.72 or newer may leave it"
        )


def check_port(address: str, port: int) -> int:
    """Gives `port`, or a free one for 0; ServerError if another process has it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {address} cannot be used: {error.strerror}; choose another with --port or "
                "--metrics-port"
            ) from error
        return int(probe.getsockname()[1])

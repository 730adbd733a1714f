"""What must be right before a tritonserver is started; each wrong thing is one line with its cure."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from ensemble.engines import CPU, GPU
from ensemble.errors import InvalidInput, ReleaseError, ServerError
from ensemble.release.release import open_release
from ensemble.release.repository import require_active, sweep
from ensemble.server.installation import Installation


def check_index(index: str) -> None:
    """InvalidInput unless the main index can be searched there."""
    if index not in (CPU, GPU):
        raise InvalidInput(f"--index {index}: is unknown; use {CPU} or {GPU}")
    if index == GPU:
        from ensemble.index.gpu_index import check_gpu

        check_gpu()


def check_servable(repository: Path) -> str:
    """The active release, with every file as its manifest says; an error that names the cure otherwise."""
    if not repository.is_dir():
        raise InvalidInput(
            f"repository {repository} does not exist; `peregrine build SHOP --activate` makes one"
        )
    if os.access(repository, os.W_OK):
        sweep(repository)
    name = require_active(repository)
    if not (repository / name / "manifest.json").exists():
        raise ReleaseError(
            f"release {name} is incomplete: {repository / name / 'manifest.json'} is missing; activate "
            "another release or build again"
        )
    open_release(repository, name).verify()
    return name


def check_address(address: str, installation: Installation) -> None:
    """Beyond loopback only a tritonserver without known holes may be reached."""
    try:
        loopback = address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise InvalidInput(
            f"address {address!r} is not an IP address; use 127.0.0.1, or 0.0.0.0 for every interface"
        ) from None
    if not loopback and not (installation.level and installation.level.may_leave_loopback):
        level = installation.level or "of unknown version"
        raise ServerError(
            f"address {address} refused: tritonserver {level} has known holes and must stay on 127.0.0.1; "
            "2.72 or newer may leave it"
        )


def check_port(address: str, port: int) -> int:
    """`port`, or a free one for 0; ServerError if somebody has it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "ports are 0 to 65535"
            raise ServerError(
                f"port {port} on {address} cannot be used: {reason}; choose another with --port or "
                "--metrics-port"
            ) from error
        return int(probe.getsockname()[1])

"""Shows, activates and removes releases of a repository, whether or not a server is at work on it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.items import make_ready
from clients.operations.control import Control
from clients.operations.listing import check_repository
from ensemble import contract
from ensemble.errors import PeregrineError, ReleaseError, ServerError
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import check_name, release_names
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import ALIAS_FILE, locked, point_alias
from ensemble.release.repository import remove as remove_files
from ensemble.server.running import running_server

# Passes between the flip and the unloading of the old release, for requests that have entered the old alias
# but not yet the old ensemble.
SETTLE_S = 0.5


@dataclass(frozen=True)
class Activation:
    """Says what an activation did."""

    release: str
    previous: str | None
    served: bool  # a running server answers with it now
    load_ms: float = 0.0  # loading and asking the release's models, beside the old ones
    flip_ms: float = 0.0  # the call that turns the alias
    warning: str = ""  # what went wrong after the alias had turned; the release is served all the same


def show(repository: Path, name: str) -> dict[str, Any]:
    """Reads the manifest of release `name`; ReleaseError if there is none."""
    check_repository(repository)
    try:
        return read_manifest(repository / check_name(name) / MANIFEST)
    except FileNotFoundError:
        there = ", ".join(release_names(repository)) or "none"
        raise ReleaseError(f"no release {name!r} in {repository}; there are: {there}") from None


def activate(repository: Path, name: str) -> Activation:
    """Makes release `name` the one that `recommend` answers with; on any fault the old one stays, on disk and
    in the server."""
    show(repository, name)
    open_release(repository, name).verify()
    with locked(repository):
        previous = active_release(repository)
        server = running_server(repository)
        if server is None:
            point_alias(repository, _alias_of(repository, name))
            return Activation(name, previous, served=False)
        with Control(server) as control:
            if name == previous and _answers(control, name):
                return Activation(name, previous, served=True)
            make_ready(repository, name)
            load_ms = _load_beside(control, name, is_served=name == previous)
            flip_ms = _flip(control, repository, name)
            warning = _unload_others(control, name)
        return Activation(name, previous, True, load_ms, flip_ms, warning)


def remove(repository: Path, name: str) -> None:
    """Removes a release that is not active, or the parts of one, from the server and from disk."""
    check_repository(repository)

    def unload() -> None:
        """Takes the release out of the server at work, if there is one."""
        server = running_server(repository)
        if server is not None:
            with Control(server) as control:
                control.unload_release(name)

    remove_files(repository, name, unload)


def _answers(control: Control, name: str) -> bool:
    """Says whether the server answers with the release already."""
    try:
        _check_canary(control, contract.PIPELINE, name)
    except ServerError:
        return False
    return True


def _load_beside(control: Control, name: str, *, is_served: bool) -> float:
    """Loads the release beside the one that serves, and asks it once; gives the milliseconds that took.

    One that fails is unloaded again, unless the alias points at it: what is served is never unloaded.
    """
    ensemble, started = f"{name}_{contract.PIPELINE}", time.perf_counter()
    try:
        control.load(ensemble)
        _check_canary(control, ensemble, name)
    except ServerError as error:
        if is_served:
            raise ReleaseError(f"release {name} is active, and could not be loaded again: {error}") from error
        with contextlib.suppress(ServerError):  # the first error is the one to tell
            control.unload_release(name)
        raise ReleaseError(f"release {name} is not activated, the old one goes on: {error}") from error
    return (time.perf_counter() - started) * 1e3


def _flip(control: Control, repository: Path, name: str) -> float:
    """Turns the alias to the release; gives the milliseconds of the server's call.

    The file goes first: a server that starts from now on agrees with the one at work.
    """
    path = repository / contract.PIPELINE / "config.pbtxt"
    before = path.read_text(encoding="utf-8")
    text = _alias_of(repository, name)
    point_alias(repository, text)
    started = time.perf_counter()
    try:
        control.load(contract.PIPELINE, _json_from_pbtxt(text))
        flip_ms = (time.perf_counter() - started) * 1e3
        _check_canary(control, contract.PIPELINE, name)
    except PeregrineError as error:
        point_alias(repository, before)
        control.load(contract.PIPELINE, _json_from_pbtxt(before))
        raise ReleaseError(f"release {name} is not activated, the old one is back: {error}") from error
    return flip_ms


def _check_canary(control: Control, model: str, name: str) -> None:
    """Asks `model` once; ServerError unless release `name` answers with at least one item."""
    release, num_items = control.canary(model)
    if release != name or not num_items:
        raise ServerError(
            f"canary request to {model}: release {release!r} answered with {num_items} items; wanted "
            f"{name!r} and at least one"
        )


def _unload_others(control: Control, name: str) -> str:
    """Unloads all releases but this one, those too that an activation had loaded which was killed before its
    flip; gives what went wrong, which takes nothing back: the alias has turned."""
    try:
        others = sorted({model.partition("_")[0] for model in _release_models(control)} - {name})
        if others:
            time.sleep(SETTLE_S)
        for other in others:
            control.unload_release(other)
    except ServerError as error:
        return f"a release that is served no longer is still loaded: {error}"
    return ""


def _release_models(control: Control) -> list[str]:
    """Names the loaded models that belong to a release: all but the alias."""
    return [model for model in control.ready_models() if model != contract.PIPELINE]


def _alias_of(repository: Path, name: str) -> str:
    """Reads the alias's config.pbtxt that a release brings along."""
    path = repository / name / ALIAS_FILE
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror}; build the release again") from error


def _json_from_pbtxt(text: str) -> str:
    """Writes a config.pbtxt as JSON, which Triton's load call takes."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return json_format.MessageToJson(text_format.Parse(text, ModelConfig()))

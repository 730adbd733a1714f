"""Turns a running server from one release to another: loads it beside, asks it, turns the alias, unloads the
old one; finishes or undoes what a killed command left."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from ensemble import contract
from ensemble.errors import PeregrineError, ReleaseError, ServerError
from ensemble.release import activation
from ensemble.release.canary import ANY_ENGINE, CANARY, read_canary
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import alias_of, put_route
from ensemble.release.route import Share, next_route, read_route
from ensemble.server.control import Control, NoAnswerError
from ensemble.server.prepared import mount_of

# Passes between the flip and the unloading of the old release, for requests that have entered the old alias
# but not yet the old ensemble.
SETTLE_S = 0.5


@dataclass(frozen=True)
class Turned:
    """Says what a turn took, and what went wrong after the alias had turned."""

    load_ms: float = 0.0
    flip_ms: float = 0.0
    warning: str = ""


class Turning:
    """Turns the server at work on a repository. Use it under locked()."""

    def __init__(self, control: Control, repository: Path) -> None:
        self.control, self.repository = control, repository
        self.mount = mount_of(control.server)

    def turn(self, name: str) -> Turned:
        """Makes the server answer with release `name`; ReleaseError on any fault, and the old one goes on.

        What is begun is written down first, so that a killed turn can be finished or undone.
        """
        previous = active_release(self.repository)
        activation.begin(self.repository, activation.Started(name, previous))
        try:
            load_ms = self._load_beside(name)
            flip_ms = self._flip(name)
        except PeregrineError as error:
            if name == previous:  # what is served is never unloaded
                said = f"release {name} is active, and could not be loaded again: {error}"
            else:
                self._withdraw(name, error)
                said = f"release {name} is not activated, {previous or 'no release'} goes on: {error}"
            activation.end(self.repository)
            raise ReleaseError(said) from error
        warning = self._unload_others(name)
        activation.end(self.repository)
        return Turned(load_ms, flip_ms, warning)

    def settle(self) -> str:
        """Finishes or undoes an activation that was killed; says which, or nothing if there was none.

        The server is made to agree with the alias on disk; if it cannot, with the other release of the two.
        """
        started = activation.unfinished(self.repository)
        if started is None:
            return ""
        active = active_release(self.repository)
        if active is not None and not self.answers(active):
            other = started.previous if active == started.release else started.release
            self._return_to([active, *([other] if other else [])])
        active = active_release(self.repository)
        warning = self._unload_others(active) if active else ""
        said = activation.outcome(self.repository, started)
        activation.end(self.repository)
        return f"{said}; {warning}" if warning else said

    def answers(self, name: str) -> bool:
        """Says whether the server answers with the release already."""
        try:
            self._check(contract.PIPELINE, name)
        except (ServerError, ReleaseError):
            return False
        return True

    def _return_to(self, names: list[str]) -> None:
        """Turns the alias to the first of these releases that answers; ReleaseError if none does."""
        errors = []
        for name in names:
            try:
                self._point(name)
                self._check(contract.PIPELINE, name)
                return
            except PeregrineError as error:
                errors.append(f"{name}: {error}")
        raise ReleaseError(
            f"an activation was killed, and neither release answers: {'; '.join(errors)}",
            "restart `peregrine serve`",
        )

    def _load_beside(self, name: str) -> float:
        """Loads the release beside the one that serves, and asks it; gives the milliseconds that took."""
        ensemble, started = f"{name}_{contract.PIPELINE}", time.perf_counter()
        self.control.load(ensemble, size_bytes=self._size_bytes(name))
        self._check(ensemble, name)
        return (time.perf_counter() - started) * 1e3

    def _size_bytes(self, name: str) -> int:
        """Gives the size of a release's files, as its manifest says."""
        files = read_manifest(self.repository / name / MANIFEST)["files"]
        return sum(int(entry["bytes"]) for entry in files.values())

    def _flip(self, name: str) -> float:
        """Turns route and alias to the release; gives the milliseconds of the server's call.

        The files go first: a server that starts from now on agrees with the one at work.
        """
        before, started = active_release(self.repository), time.perf_counter()
        try:
            self._point(name)
            flip_ms = (time.perf_counter() - started) * 1e3
            self._check(contract.PIPELINE, name)
        except PeregrineError:
            if before is not None:
                self._point(before)
            raise
        return flip_ms

    def _point(self, name: str) -> None:
        """Makes the release the route's only one, on disk and then in the server."""
        put_route(self.repository, next_route(read_route(self.repository), [Share(name, 1.0)]))
        alias = alias_of(self.repository, name)
        self.mount.point(alias)  # for a tritonserver that has to be started again
        self.control.load(contract.PIPELINE, _json_from_pbtxt(alias))

    def _check(self, model: str, name: str) -> None:
        """Asks `model` for the lists of the release's own users; ServerError unless release `name` answers
        and the lists are near those of its build."""
        release = open_release(self.repository, name)
        canary = read_canary(release.path / CANARY)
        answer = self.control.ask(model, canary.user_ids, canary.top_k)
        releases = set(answer["release"].ravel().tolist()) if "release" in answer else set()
        if releases != {name.encode()}:
            raise ServerError(f"{model}: {releases or 'nobody'} answered instead of {name}")
        # Rows in Redis are newer than the release's, and items may have changed since it was built
        newest = int(answer["sequence"].max()) if "sequence" in answer else 0
        is_as_built = newest <= release.watermark.sequence and not self.control.server.has_redis
        if fault := canary.fault(answer, ANY_ENGINE if is_as_built else None):
            raise ServerError(f"{model}: {fault}")

    def _withdraw(self, name: str, error: PeregrineError) -> None:
        """Unloads a release that failed with `error`; what goes wrong is not raised, as the first error is
        the one to tell."""
        with contextlib.suppress(ServerError):
            if isinstance(error, NoAnswerError):
                self.control.kill_release(name)
            else:
                self.control.unload_release(name)
            self.mount.remove(name)

    def _unload_others(self, name: str) -> str:
        """Unloads all releases but this one, those too that an activation had loaded which was killed before
        its flip; gives what went wrong, which takes nothing back: the alias has turned."""
        try:
            models = self.control.models()
            others = sorted({model.partition("_")[0] for model in models} - {name, contract.PIPELINE})
            if others:
                time.sleep(SETTLE_S)
            for other in others:
                self.control.unload_release(other)
                self.mount.remove(other)
        except ServerError as error:
            return f"a release that is served no longer is still loaded: {error}"
        return ""


def _json_from_pbtxt(text: str) -> str:
    """Writes a config.pbtxt as JSON, which Triton's load call takes."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return json_format.MessageToJson(text_format.Parse(text, ModelConfig()))

"""Turns a running server from one release to another: loads it beside, asks it, turns the alias, unloads the
old one; finishes or undoes what a killed command left."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble import contract
from ensemble.contract import Degraded
from ensemble.errors import PeregrineError, ReleaseError, ServerError
from ensemble.release import activation
from ensemble.release.canary import ANY_ENGINE, CANARY, read_canary
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import ROUTER
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import put_route
from ensemble.release.route import Route, Share, next_route, read_route
from ensemble.server.control import READY, Control, NoAnswerError
from ensemble.server.prepared import mount_of
from ensemble.server.router_files import alias_text, only, router_of, step_of, write_router

# Passes between the flip and the unloading of the old release, for requests that have entered the old alias
# but not yet the old ensemble.
SETTLE_S = 0.5
TRIES = 5  # for a canary to answer in its part of the time
HANGS_S = 3.0  # a router that takes longer to go waits for a release that does not answer


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
        """Makes the server answer with release `name`; ReleaseError on any fault, and the old one goes on."""
        return self.change([Share(name, 1.0)], activation.ACTIVATION)

    def abort(self, by: str = "") -> Turned:
        """Gives all users to the route's main release, which is loaded: nothing is asked before."""
        route = current_route(self.repository)
        shares = [Share(route.main, 1.0)] if route else []
        return self.change(shares, activation.ABORT, by, is_asked=False)

    def change(self, shares: Sequence[Share], what: str, by: str = "", *, is_asked: bool = True) -> Turned:
        """Makes the server answer by these shares of releases; ReleaseError on any fault, and what was served
        goes on.

        What is begun is written down first, so that a killed change can be finished or undone.
        """
        before = current_route(self.repository)
        route = next_route(before, shares, by)
        started = activation.Started(what, route.shares, before.shares if before else ())
        activation.begin(self.repository, started)
        try:
            load_ms = self._load_beside(route, is_asked=is_asked)
            flip_ms = self._flip(route, before, is_asked=is_asked)
        except PeregrineError as error:
            for name in set(route.releases) - set(before.releases if before else ()):
                self._withdraw(name, error)  # what is served is never unloaded
            with contextlib.suppress(ServerError):
                self._unload_routers(current_route(self.repository))
            activation.end(self.repository)
            raise ReleaseError(f"{started.refusal}: {error}") from error
        warning = self._unload_others(route)
        activation.end(self.repository)
        return Turned(load_ms, flip_ms, warning)

    def settle(self) -> str:
        """Finishes or undoes a change that was killed; says which, or nothing if there was none.

        The server is made to agree with the route on disk; if it cannot, with the other of the two.
        """
        started = activation.unfinished(self.repository)
        if started is None:
            return ""
        route = current_route(self.repository)
        if route is not None and not self.answers(route):
            other = started.before if route.shares == started.after else started.after
            self._return_to([route.shares, *([other] if other else [])])
        route = current_route(self.repository)
        warning = self._unload_others(route) if route else ""
        said = activation.outcome(self.repository, started)
        activation.end(self.repository)
        return f"{said}; {warning}" if warning else said

    def answers(self, route: Route) -> bool:
        """Says whether the server answers by the route already: a few users may be the same releases' by
        another route, so that the alias is looked at, too."""
        try:
            if self.control.step_of(contract.PIPELINE) != step_of(route):
                return False
            self._check(contract.PIPELINE, route)
        except (ServerError, ReleaseError):
            return False
        return True

    def _return_to(self, choices: list[tuple[Share, ...]]) -> None:
        """Turns route and alias to the first of these that answers; ReleaseError if none does."""
        errors = []
        for shares in choices:
            route = next_route(current_route(self.repository), shares)
            try:
                for name in route.releases:
                    self._load(name)
                self._load_router(route)
                self._point(route)
                self._check(contract.PIPELINE, route)
                return
            except PeregrineError as error:
                errors.append(f"{', '.join(route.releases)}: {error}")
        raise ReleaseError(
            f"an activation was killed, and neither release answers: {'; '.join(errors)}",
            "restart `peregrine serve`",
        )

    def _load_beside(self, route: Route, *, is_asked: bool) -> float:
        """Loads the route's releases beside what serves, and what splits users between them, and asks them;
        gives the milliseconds that took."""
        started = time.perf_counter()
        for name in route.releases:
            if is_asked or not self._is_ready(f"{name}_{contract.PIPELINE}"):
                self._load(name)
            if is_asked:
                self._check(f"{name}_{contract.PIPELINE}", only(name))
        if (router := self._load_router(route)) and is_asked:
            self._check(router, route)
        return (time.perf_counter() - started) * 1e3

    def _load(self, name: str) -> None:
        """Loads a release's ensemble, if it is not, with its members."""
        self.control.load(f"{name}_{contract.PIPELINE}", size_bytes=self._size_bytes(name))

    def _load_router(self, route: Route) -> str | None:
        """Loads what splits a route's users, if it is not; gives its name, None where nothing has to."""
        router, server = router_of(route), self.control.server
        if router and not self._is_ready(router):
            write_router(
                self.mount.folder,
                self.repository,
                route,
                fused=server.is_fused,
                instances=server.instances,
            )
            sizes = sum(self._size_bytes(name) for name in route.releases) if server.is_fused else 0
            self.control.load(router, size_bytes=sizes)
        return router

    def _is_ready(self, model: str) -> bool:
        """Says whether a model is loaded."""
        return self.control.models().get(model) == READY

    def _size_bytes(self, name: str) -> int:
        """Gives the size of a release's files, as its manifest says."""
        files = read_manifest(self.repository / name / MANIFEST)["files"]
        return sum(int(entry["bytes"]) for entry in files.values())

    def _flip(self, route: Route, before: Route | None, *, is_asked: bool) -> float:
        """Turns route and alias; gives the milliseconds of the server's call.

        The files go first: a server that starts from now on agrees with the one at work.
        """
        started = time.perf_counter()
        try:
            self._point(route)
            flip_ms = (time.perf_counter() - started) * 1e3
            if is_asked:
                self._check(contract.PIPELINE, route)
        except PeregrineError:
            if before is not None:
                back = next_route(route, before.shares)
                self._load_router(back)
                self._point(back)
            raise
        return flip_ms

    def _point(self, route: Route) -> None:
        """Makes this the route, on disk and then in the server."""
        put_route(self.repository, route)
        alias = alias_text(self.repository, route)
        self.mount.point(alias)  # for a tritonserver that has to be started again
        self.control.load(contract.PIPELINE, _json_from_pbtxt(alias))

    def _check(self, model: str, route: Route) -> None:
        """Asks `model` for the lists of the main release's own users; ServerError unless each user's release
        answers, and the main one's lists are near those of its build."""
        release = open_release(self.repository, route.main)
        canary = read_canary(release.path / CANARY)
        for _ in range(TRIES if route.canary else 1):
            answer = self.control.ask(model, canary.user_ids, canary.top_k)
            if "degraded" not in answer or not (answer["degraded"] & Degraded.CANARY_FAILED).any():
                break  # else it was late: what has just been loaded is slow at first
        wanted = [route.releases[place] for place in route.places([u.encode() for u in canary.user_ids])]
        given = [name.decode() for name in answer["release"].ravel().tolist()] if "release" in answer else []
        if given != wanted:
            who = ", ".join(sorted(set(given))) or "nobody"
            raise ServerError(f"{model}: {who} answered instead of {', '.join(sorted(set(wanted)))}")
        # Rows in Redis are newer than the release's, items may have changed since it was built, and a route
        # gives some users another release's lists
        newest = int(answer["sequence"].max()) if "sequence" in answer else 0
        is_as_built = newest <= release.watermark.sequence and not self.control.server.has_redis
        if fault := canary.fault(answer, ANY_ENGINE if is_as_built and route.canary is None else None):
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

    def _unload_others(self, route: Route) -> str:
        """Unloads all that the route does not need, those releases too that a change had loaded which was
        killed before its flip; gives what went wrong, which takes nothing back: the alias has turned."""
        try:
            # Served fused, the router runs the canary in its own processes
            needed = {route.main} if self.control.server.is_fused else set(route.releases)
            others = sorted(self._loaded_releases() - needed)
            if others or self._routers() - {router_of(route)}:
                time.sleep(SETTLE_S)
            self._unload_routers(route)
            for other in others:
                self.control.unload_release(other)
                if other not in route.releases:
                    self.mount.remove(other)
        except ServerError as error:
            return f"a release that is served no longer is still loaded: {error}"
        return ""

    def _loaded_releases(self) -> set[str]:
        """Names the releases of which models are loaded."""
        return {model.partition("_")[0] for model in self.control.models()} - {contract.PIPELINE, ROUTER}

    def _routers(self) -> set[str | None]:
        """Names the routers that are loaded."""
        return {model for model in self.control.models() if model.startswith(f"{ROUTER}_")}

    def _unload_routers(self, route: Route | None) -> None:
        """Unloads the routers of other routes, before the releases that they ask. One that does not go waits
        for a release that hangs: which is none of this route's, and is ended."""
        for router in self._routers() - {router_of(route) if route else None}:
            try:
                self.control.unload_model(str(router), HANGS_S)
            except NoAnswerError:
                for name in self._loaded_releases() - set(route.releases if route else ()):
                    self.control.kill_release(name)
                self.control.unload_model(str(router))
            shutil.rmtree(self.mount.folder / str(router), ignore_errors=True)


def current_route(repository: Path) -> Route | None:
    """Reads the route; where none was written yet, it is the active release's alone."""
    route = read_route(repository)
    if route is None and (active := active_release(repository)) is not None:
        return only(active)
    return route


def _json_from_pbtxt(text: str) -> str:
    """Writes a config.pbtxt as JSON, which Triton's load call takes."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return json_format.MessageToJson(text_format.Parse(text, ModelConfig()))

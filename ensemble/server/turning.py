"""Turns one server to a route: loads its releases beside what serves, asks them, turns the alias, unloads
what is served no longer.

Commands do it to every server (group.py), and each server to itself (following.py).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from ensemble import contract
from ensemble.contract import Degraded
from ensemble.errors import PeregrineError, ReleaseError, ServerError
from ensemble.release.canary import ANY_ENGINE, CANARY, read_canary
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import ROUTER
from ensemble.release.release import open_release
from ensemble.release.repository import aliases_of
from ensemble.release.route import Route
from ensemble.server.control import READY, Control, NoAnswerError
from ensemble.server.prepared import mount_of, prepare_release
from ensemble.server.router_files import alias_texts, only, routers_of, routes_of, steps_of, write_routers
from ensemble.steps.search_settings import read_search

# Passes between the flip and the unloading of the old release, for requests that have entered the old alias
# but not yet the old ensemble.
SETTLE_S = 0.5
TRIES = 5  # for a canary to answer in its part of the time
HANGS_S = 3.0  # a router that takes longer to go waits for a release that does not answer


class Turning:
    """Turns one server. Use it under its mount's lock (Mount.turning)."""

    def __init__(self, control: Control, repository: Path) -> None:
        self.control, self.repository = control, repository
        self.mount = mount_of(control.server)

    @property
    def route(self) -> Route:
        """Gives the route that the server serves."""
        return self.mount.route()

    def prepare(self, name: str, require: str | None = None) -> str:
        """Mounts a release, unless it is served; gives what it will run on if that is less than the server
        could. ReleaseError if it cannot run here, or not on what is required."""
        release, is_loaded = open_release(self.repository, name), name in self.route.releases
        return prepare_release(self.control.server, release, require, is_loaded=is_loaded)

    def follow(self, route: Route) -> str:
        """Turns the server to a route that is written down already; gives what went wrong afterwards.

        ReleaseError or ServerError if it cannot, and what it serves goes on.
        """
        try:
            for name in set(route.releases) - set(self.route.releases):
                self.prepare(name)
            self.load_beside(route)
            self.flip(route)
        except PeregrineError as error:
            self.withdraw(route, error)
            raise
        return self.unload_others(route)

    def answers(self, route: Route) -> bool:
        """Says whether the server answers by the route already: a few users may be the same releases' by
        another route, so that the alias is looked at, too."""
        try:
            steps = steps_of(self.repository, route)
            if self.mount.pipelines != list(steps):
                return False
            if any(self.control.step_of(pipeline) != step for pipeline, step in steps.items()):
                return False
            self._check_aliases(route)
        except (ServerError, ReleaseError):
            return False
        return True

    def return_to(self, route: Route) -> None:
        """Turns the alias to a route of which some may be loaded and some not, whatever is served."""
        for name in route.releases:
            if not self.mount.has(open_release(self.repository, name)):
                self.prepare(name)
            self._load(name)
        self._load_routers(route)
        self._point(route)
        self._check_aliases(route)

    def load_beside(self, route: Route, *, is_asked: bool = True) -> float:
        """Loads the route's releases beside what serves, and what splits users between them, and asks them;
        gives the milliseconds that took."""
        started = time.perf_counter()
        for name in route.releases:
            if is_asked or not self._is_ready(f"{name}_{contract.PIPELINE}"):
                self._load(name)
            for pipeline in aliases_of(self.repository, name) if is_asked else ():
                self._check(f"{name}_{pipeline}", only(name), pipeline)
        for pipeline, router in self._load_routers(route).items() if is_asked else ():
            self._check(router, route, pipeline)
        return (time.perf_counter() - started) * 1e3

    def _load(self, name: str) -> None:
        """Loads a release's ensembles, if they are not, with their members."""
        for pipeline in aliases_of(self.repository, name):
            self.control.load(f"{name}_{pipeline}", size_bytes=self._size_bytes(name))

    def _load_routers(self, route: Route) -> dict[str, str]:
        """Loads what splits a route's users, where it is not; gives the names by pipeline, none where nothing
        has to."""
        routers, server = routers_of(self.repository, route), self.control.server
        new = [router for router in routers.values() if not self._is_ready(router)]
        if new:
            fused, instances = server.is_fused, server.instances
            write_routers(self.mount.folder, self.repository, route, fused=fused, instances=instances)
        sizes = sum(self._size_bytes(name) for name in route.releases) if server.is_fused else 0
        for router in new:
            self.control.load(router, size_bytes=sizes)
        return routers

    def _is_ready(self, model: str) -> bool:
        """Says whether a model is loaded."""
        return self.control.models().get(model) == READY

    def _size_bytes(self, name: str) -> int:
        """Gives the size of a release's files, as its manifest says."""
        files = read_manifest(self.repository / name / MANIFEST)["files"]
        return sum(int(entry["bytes"]) for entry in files.values())

    def flip(self, route: Route, *, is_asked: bool = True) -> float:
        """Turns the alias to a route whose releases are loaded, or back to what it was; gives the
        milliseconds of the server's call."""
        before, started = self.route, time.perf_counter()
        try:
            self._point(route)
            flip_ms = (time.perf_counter() - started) * 1e3
            if is_asked:
                self._check_aliases(route)
        except PeregrineError:
            self.turn_back(before)
            raise
        return flip_ms

    def turn_back(self, route: Route) -> None:
        """Turns the alias to a route that was served a moment ago."""
        self._load_routers(route)
        self._point(route)

    def _point(self, route: Route) -> None:
        """Turns the aliases, in the mount and then in the server; one of a pipeline that the route's main
        release has not goes."""
        aliases, before = alias_texts(self.repository, route), self.mount.pipelines
        self.mount.point(route, aliases)  # for a tritonserver that has to be started again
        for pipeline, alias in aliases.items():
            self.control.load(pipeline, _json_from_pbtxt(alias))
        for pipeline in before:
            if pipeline not in aliases:
                self.control.unload_model(pipeline)

    def _check_aliases(self, route: Route) -> None:
        """Asks each pipeline's alias as _check does."""
        for pipeline, mine in routes_of(self.repository, route).items():
            self._check(pipeline, mine, pipeline)

    def _check(self, model: str, route: Route, pipeline: str = contract.PIPELINE) -> None:
        """Asks `model` for the lists of the main release's own users; ServerError unless each user's release
        answers, and the main one's lists are near those of its build.

        A search is asked for what the build knows to be there, and its lists must be lists.
        """
        release = open_release(self.repository, route.main)
        canary, text = read_canary(release.path / CANARY), None
        if pipeline == contract.SEARCH:
            text = read_search(release.path).probe
        for _ in range(TRIES if route.canary else 1):
            answer = self.control.ask(model, canary.user_ids, canary.options, text)
            if "degraded" not in answer or not (answer["degraded"] & Degraded.CANARY_FAILED).any():
                break  # else it was late: what has just been loaded is slow at first
            time.sleep(SETTLE_S)
        wanted = [route.releases[place] for place in route.places([u.encode() for u in canary.user_ids])]
        given = [name.decode() for name in answer["release"].ravel().tolist()] if "release" in answer else []
        if given != wanted:
            who = ", ".join(sorted(set(given))) or "nobody"
            raise ServerError(f"{model}: {who} answered instead of {', '.join(sorted(set(wanted)))}")
        # Rows in Redis are newer than the release's, items may have changed since it was built, and a route
        # gives some users another release's lists
        if text is not None:
            if fault := canary.fault_of_search(answer):
                raise ServerError(f"{model}: {fault}")
            return
        newest = int(answer["sequence"].max()) if "sequence" in answer else 0
        is_as_built = newest <= release.watermark.sequence and not self.control.server.has_redis
        if fault := canary.fault(answer, ANY_ENGINE if is_as_built and route.canary is None else None):
            raise ServerError(f"{model}: {fault}")

    def withdraw(self, route: Route, error: PeregrineError) -> None:
        """Unloads what of a route that failed with `error` is not served; what goes wrong is not raised, as
        the first error is the one to tell."""
        for name in set(route.releases) - set(self.route.releases):
            with contextlib.suppress(ServerError):
                if isinstance(error, NoAnswerError):
                    self.control.kill_release(name)
                else:
                    self.control.unload_release(name)
                self.mount.remove(name)
        with contextlib.suppress(ServerError):
            self._unload_routers(self.route)

    def unload_others(self, route: Route) -> str:
        """Unloads all that the route does not need, those releases too that a change had loaded which was
        killed before its flip; gives what went wrong, which takes nothing back: the alias has turned."""
        try:
            # Served fused, the router runs the canary in its own processes
            needed = {route.main} if self.control.server.is_fused else set(route.releases)
            others = sorted(self._loaded_releases() - needed)
            if others or self._routers() - set(routers_of(self.repository, route).values()):
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
        return {model.partition("_")[0] for model in self.control.models()} - {*contract.PIPELINES, ROUTER}

    def _routers(self) -> set[str]:
        """Names the routers that are loaded."""
        return {model for model in self.control.models() if model.startswith(f"{ROUTER}_")}

    def _unload_routers(self, route: Route) -> None:
        """Unloads the routers of other routes, before the releases that they ask. One that does not go waits
        for a release that hangs: which is none of this route's, and is ended."""
        for router in self._routers() - set(routers_of(self.repository, route).values()):
            try:
                self.control.unload_model(router, HANGS_S)
            except NoAnswerError:
                for name in self._loaded_releases() - set(route.releases):
                    self.control.kill_release(name)
                self.control.unload_model(router)
            shutil.rmtree(self.mount.folder / router, ignore_errors=True)


def _json_from_pbtxt(text: str) -> str:
    """Writes a config.pbtxt as JSON, which Triton's load call takes."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return json_format.MessageToJson(text_format.Parse(text, ModelConfig()))

"""Keeps the model repository that one tritonserver reads, in the server's state folder: <state>/models.

A release may lie on a read-only disk, several servers may serve it, and each chooses plans and numbers of
instances for itself: so configurations, code and the alias are copies here, and what is large is a link.
Nothing is run but what is known (ensemble/release/foreign.py); a release is mounted before it is loaded.

Rejected: two --model-repository paths (Triton loads no model that is in both); a link to the plan inside the
release (dangling until compiled, and then a server could not fall back to ONNX model by model).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ensemble import contract
from ensemble.engines.plans import Plan
from ensemble.errors import ReleaseError, ServerError
from ensemble.release import foreign
from ensemble.release.files import NO_BYTECODE, try_flock, write_durably
from ensemble.release.release import Release
from ensemble.release.repository import alias_file
from ensemble.release.route import Route, route_from_json
from ensemble.server.installation import MOUNT, ROUTE, STAGED, TURNING

_CONFIG = "config.pbtxt"


class Busy(ServerError):
    """Says that somebody else is turning the server."""


class Mount:
    """Mounts releases for one server, and points its alias at one."""

    def __init__(self, state: Path, instances: int | None = None, num_gpus: int = 1) -> None:
        """Mounts in `state`; `instances` Python processes of each step, None as the release says; engines of
        Triton's own backend on each of the first `num_gpus` GPUs."""
        self.folder, self._staged = state / MOUNT, state / STAGED
        self.instances, self._num_gpus = instances, num_gpus
        self._route, self._lock = state / ROUTE, state / TURNING

    def add(self, release: Release, plans: Sequence[Plan] = ()) -> None:
        """Mounts a release that is not loaded, its models with a plan from the plan's folder; ReleaseError if
        it brings code, or the folder cannot be written."""
        planned = {plan.member: plan.member_folder for plan in plans}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for pipeline in release.pipelines:
                foreign.read_configuration(release.path / alias_file(pipeline), "")
            for model in _models(release):
                source = planned.get(model, release.repository / model)
                self._place(
                    model, source, _plan_files(source) if model in planned else _files(release, model)
                )
        except OSError as error:
            raise ReleaseError(
                f"release {release.name} cannot be mounted in {self.folder}: {error.strerror}",
                "free some space, or give `peregrine serve` another --state",
            ) from error

    def _place(self, model: str, source: Path, files: Iterator[str]) -> None:
        """Mounts one model: all of it is there, or what was there before."""
        staged, place = self._staged / f"{os.getpid()}-{model}", self.folder / model
        shutil.rmtree(staged, ignore_errors=True)
        (staged / "1").mkdir(parents=True)
        (staged / "1" / NO_BYTECODE).touch()  # a changed version folder is loaded again at the next flip
        for relative in files:
            path = staged / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if relative == foreign.CODE:
                path.write_text(foreign.read_code(source / relative), encoding="utf-8")
            elif foreign.CONFIGURATION.fullmatch(relative):
                path.write_text(self._configuration(source / relative, model), encoding="utf-8")
            else:
                foreign.check_file(source / relative, model, relative)
                path.symlink_to(source / relative)
        shutil.rmtree(place, ignore_errors=True)
        staged.rename(place)

    def _configuration(self, file: Path, model: str) -> str:
        """Gives a configuration as this server wants it: with its number of instances, on its GPUs."""
        return with_instances(foreign.read_configuration(file, model), self.instances, self._num_gpus)

    def remove(self, name: str) -> None:
        """Unmounts a release that is loaded no longer."""
        for folder in self.folder.glob(f"{name}_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def has(self, release: Release) -> bool:
        """Says whether a release is mounted."""
        return all((self.folder / model / "1").is_dir() for model in _models(release))

    def has_plan(self, plan: Plan) -> bool:
        """Says whether a model is mounted from its plan's folder."""
        links = (path for path in (self.folder / plan.member / "1").glob("*") if path.is_symlink())
        return any(path.readlink().is_relative_to(plan.member_folder) for path in links)

    def point(self, route: Route, aliases: Mapping[str, str]) -> None:
        """Notes the route that this server serves; `aliases` are the configurations of the models that
        clients call, by pipeline, for a tritonserver that has to be started again."""
        for pipeline in contract.PIPELINES:
            folder = self.folder / pipeline
            if pipeline not in aliases:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            (folder / "1").mkdir(parents=True, exist_ok=True)
            write_durably(folder / _CONFIG, aliases[pipeline])
        write_durably(self._route, route.to_json())

    @property
    def pipelines(self) -> list[str]:
        """Names the pipelines that clients can call; `recommend`, too, before anything is mounted."""
        others = (one for one in contract.PIPELINES[1:] if (self.folder / one / _CONFIG).exists())
        return [contract.PIPELINE, *others]

    def route(self) -> Route:
        """Gives the route that this server serves."""
        return route_from_json(self._route.read_text(encoding="utf-8"), str(self._route))

    @contextlib.contextmanager
    def turning(self, wait_s: float) -> Iterator[None]:
        """Is for one who changes what the server serves, a command or the server itself; Busy if it is not
        free within `wait_s`."""
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        try:
            while not try_flock(lock):
                if time.monotonic() >= deadline:
                    raise Busy(f"the server of {self._lock.parent} is turning", "try again in a minute")
                time.sleep(0.02)
            yield
        finally:
            os.close(lock)


def _models(release: Release) -> list[str]:
    """Lists the folders of a release's models, as its manifest has them."""
    return sorted({path.partition("/")[0] for path in release.manifest["files"]} - {release.name})


def _files(release: Release, model: str) -> Iterator[str]:
    """Lists the files of a model as its manifest has them."""
    start = f"{model}/"
    return (path.removeprefix(start) for path in release.manifest["files"] if path.startswith(start))


def _plan_files(folder: Path) -> Iterator[str]:
    """Lists the files of a plan's folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != NO_BYTECODE)
    return (str(path.relative_to(folder)) for path in files)


def with_instances(text: str, count: int | None, num_gpus: int) -> str:
    """Gives a configuration with `count` instances in each of its groups of Python processes, if that is
    asked for, and with its groups of engines on each of `num_gpus` GPUs."""
    if not (count and "KIND_CPU" in text) and not (num_gpus > 1 and "KIND_GPU" in text):
        return text
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = text_format.Parse(text, ModelConfig())
    for group in config.instance_group:
        if group.kind == group.KIND_GPU:
            group.gpus[:] = range(num_gpus)
        elif count:
            group.count = count
    return text_format.MessageToString(config)

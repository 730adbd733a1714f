"""Writes the models of a route's routers, and the aliases that name them, into the folder that a server
mounts: of each pipeline that the main release has, one.

All follow from the aliases that the two releases bring along. A router is named by the route's sequence: a
changed route is another model, which is loaded beside the one at work. Where the release that is tried has
not the pipeline, the main one answers its users, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble import contract
from ensemble.errors import ReleaseError
from ensemble.release.files import NO_BYTECODE
from ensemble.release.names import ROUTER
from ensemble.release.repository import alias_of, aliases_of
from ensemble.release.route import Route, Share, route_from_json

MODEL_PY = (
    "import triton_python_backend_utils  # noqa: F401  (puts our packages first)\n"
    "from ensemble.router_model import RouterModel as TritonPythonModel  # noqa: F401\n"
)
NUMBERS = "route-numbers"  # in the server's state folder: a file of counts of each instance of a router
_INSTANCES = 2  # one answers when the other has died


def only(name: str) -> Route:
    """Makes the route of one release, for where none was written yet, or to hold answers against."""
    return Route((Share(name, 1.0),), "", 1)


def router_of(route: Route, pipeline: str = contract.PIPELINE) -> str | None:
    """Names the model that splits a pipeline's users; None while the route has one release."""
    part = "" if pipeline == contract.PIPELINE else f"{pipeline}_"
    return f"{ROUTER}_{part}{route.sequence}" if route.canary else None


def routes_of(repository: Path, route: Route) -> dict[str, Route]:
    """Gives the pipelines that a route's main release has, each with the route of those who have it."""
    have = {name: aliases_of(repository, name) for name in route.releases}
    alone = Route((Share(route.main, 1.0),), route.salt, route.sequence, route.since, route.by)
    return {
        pipeline: route if all(pipeline in have[name] for name in route.releases) else alone
        for pipeline in have[route.main]
    }


def steps_of(repository: Path, route: Route) -> dict[str, str]:
    """Names the model that each alias's only step is, by pipeline."""
    routes = routes_of(repository, route).items()
    return {one: router_of(mine, one) or f"{route.main}_{one}" for one, mine in routes}


def routers_of(repository: Path, route: Route) -> dict[str, str]:
    """Names the routers of a route, by pipeline."""
    named = {one: router_of(mine, one) for one, mine in routes_of(repository, route).items()}
    return {pipeline: router for pipeline, router in named.items() if router is not None}


def alias_texts(repository: Path, route: Route) -> dict[str, str]:
    """Gives the aliases' configurations by pipeline: one step, the release or the router."""
    from google.protobuf import text_format

    texts = {}
    for pipeline, step in steps_of(repository, route).items():
        config = _parsed(alias_of(repository, route.main, pipeline))
        config.ensemble_scheduling.step[0].model_name = step
        texts[pipeline] = str(text_format.MessageToString(config))
    return texts


def write_routers(
    folder: Path, repository: Path, route: Route, *, fused: bool, instances: int | None = None
) -> None:
    """Writes the routers' models into `folder`; ReleaseError if the releases answer with other tensors."""
    for pipeline, name in routers_of(repository, route).items():
        text = _router_text(repository, route, name, pipeline, fused=fused, instances=instances)
        _write_router(folder, name, text)


def _write_router(folder: Path, name: str, text: str) -> None:
    """Writes one router, whole before it has its name."""
    place, staged = folder / name, folder / f".{name}"
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "1").mkdir(parents=True)
    (staged / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")
    (staged / "1" / NO_BYTECODE).touch()
    (staged / "config.pbtxt").write_text(text, encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)


def _router_text(
    repository: Path, route: Route, name: str, pipeline: str, *, fused: bool, instances: int | None
) -> str:
    """Configures a router: the alias's tensors, run by the Python backend, the route as a parameter."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    check_same(repository, route.releases, pipeline)
    aliases = [_parsed(alias_of(repository, release, pipeline)) for release in route.releases]
    main = aliases[0]
    config = ModelConfig(name=name, backend="python", input=main.input, output=main.output)
    config.max_batch_size = min(alias.max_batch_size for alias in aliases)
    config.parameters["route"].string_value = route.to_json()
    config.parameters["pipeline"].string_value = pipeline
    if fused:
        config.parameters["fused"].string_value = "1"
    config.dynamic_batching.max_queue_delay_microseconds = 0
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=instances or _INSTANCES, kind=ModelInstanceGroup.KIND_CPU)
    return str(text_format.MessageToString(config))


def _parsed(text: str) -> Any:
    """Reads a config.pbtxt."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(text, ModelConfig())


def check_same(repository: Path, names: Sequence[str], pipeline: str = contract.PIPELINE) -> None:
    """Raises ReleaseError unless releases take and give the same tensors: one answer has rows of both."""
    aliases = [_parsed(alias_of(repository, name, pipeline)) for name in names]
    main, *others = ([*alias.input, *alias.output] for alias in aliases)
    for other in others:
        if differing := [mine.name for mine, its in zip(main, other, strict=False) if mine != its]:
            raise ReleaseError(
                f"releases {' and '.join(names)} cannot share the users: {', '.join(differing)} of their "
                "answers differ in shape, as with other tasks",
                "activate the new one instead",
            )


def models_to_load(mounted: Path, *, fused: bool) -> list[str]:
    """Lists what a tritonserver has to load from its mount: each pipeline's alias, and, where that is a
    route's, the releases that the router asks, or, fused, the one that it could return to."""
    there = [one for one in contract.PIPELINES if (mounted / one / "config.pbtxt").exists()]
    if contract.PIPELINE not in there:  # nothing is mounted: Triton will say so
        return [contract.PIPELINE]
    return [model for pipeline in there for model in _to_load(mounted, pipeline, fused=fused)]


def _to_load(mounted: Path, pipeline: str, *, fused: bool) -> list[str]:
    """Lists what one pipeline's alias needs, and the alias."""
    path = mounted / pipeline / "config.pbtxt"
    step = _parsed(path.read_text(encoding="utf-8")).ensemble_scheduling.step[0].model_name
    if not step.startswith(f"{ROUTER}_"):
        return [pipeline]
    router = _parsed((mounted / step / "config.pbtxt").read_text(encoding="utf-8"))
    route = route_from_json(router.parameters["route"].string_value, step)
    asked = [route.main] if fused else route.releases
    return [*(f"{name}_{pipeline}" for name in asked), pipeline]

"""Writes the model of a route's router, and the alias that names it, into the folder that a server mounts.

Both follow from the aliases that the two releases bring along. The router is named by the route's sequence: a
changed route is another model, which is loaded beside the one at work.
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
from ensemble.release.repository import alias_of
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


def router_of(route: Route) -> str | None:
    """Names the model that splits users; None while the route has one release."""
    return f"{ROUTER}_{route.sequence}" if route.canary else None


def step_of(route: Route) -> str:
    """Names the model that the alias's only step is."""
    return router_of(route) or f"{route.main}_{contract.PIPELINE}"


def alias_text(repository: Path, route: Route) -> str:
    """Gives the alias's configuration: one step, the release or the router."""
    from google.protobuf import text_format

    router, text = router_of(route), alias_of(repository, route.main)
    if router is None:
        return text
    config = _parsed(text)
    config.ensemble_scheduling.step[0].model_name = router
    return str(text_format.MessageToString(config))


def write_router(
    folder: Path, repository: Path, route: Route, *, fused: bool, instances: int | None = None
) -> None:
    """Writes the router's model into `folder`; ReleaseError if the releases answer with other tensors."""
    name = router_of(route)
    if name is None:
        return
    text = _router_text(repository, route, name, fused=fused, instances=instances)
    place, staged = folder / name, folder / f".{name}"
    shutil.rmtree(staged, ignore_errors=True)
    (staged / "1").mkdir(parents=True)
    (staged / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")
    (staged / "1" / NO_BYTECODE).touch()
    (staged / "config.pbtxt").write_text(text, encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)


def _router_text(repository: Path, route: Route, name: str, *, fused: bool, instances: int | None) -> str:
    """Configures the router: the alias's tensors, run by the Python backend, the route as a parameter."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    check_same(repository, route.releases)
    aliases = [_parsed(alias_of(repository, release)) for release in route.releases]
    main = aliases[0]
    config = ModelConfig(name=name, backend="python", input=main.input, output=main.output)
    config.max_batch_size = min(alias.max_batch_size for alias in aliases)
    config.parameters["route"].string_value = route.to_json()
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


def check_same(repository: Path, names: Sequence[str]) -> None:
    """Raises ReleaseError unless releases take and give the same tensors: one answer has rows of both."""
    aliases = [_parsed(alias_of(repository, name)) for name in names]
    main, *others = ([*alias.input, *alias.output] for alias in aliases)
    for other in others:
        if differing := [mine.name for mine, its in zip(main, other, strict=False) if mine != its]:
            raise ReleaseError(
                f"releases {' and '.join(names)} cannot share the users: {', '.join(differing)} of their "
                "answers differ in shape, as with other tasks",
                "activate the new one instead",
            )


def models_to_load(mounted: Path, *, fused: bool) -> list[str]:
    """Lists what a tritonserver has to load from its mount: the alias, and, where that is a route's, the
    releases that the router asks, or, fused, the one that it could return to."""
    path = mounted / contract.PIPELINE / "config.pbtxt"
    if not path.exists():  # nothing is mounted: Triton will say so
        return [contract.PIPELINE]
    step = _parsed(path.read_text(encoding="utf-8")).ensemble_scheduling.step[0].model_name
    if not step.startswith(f"{ROUTER}_"):
        return [contract.PIPELINE]
    router = _parsed((mounted / step / "config.pbtxt").read_text(encoding="utf-8"))
    route = route_from_json(router.parameters["route"].string_value, step)
    asked = [route.main] if fused else route.releases
    return [*(f"{name}_{contract.PIPELINE}" for name in asked), contract.PIPELINE]

"""Says which models of a server have to be at work, in how many processes, and what to ask each of them.

All of it stands in the configurations that the server has mounted, so that it is known before the first
process is seen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble import contract
from ensemble.errors import ReleaseError
from ensemble.release.canary import CANARY_USER
from ensemble.release.route import Route
from ensemble.server.router_files import router_of

# A request's parameter that a router answers at once with INVALID_ARGUMENT: it is counted for no release
PROBE = "peregrine_probe"
_BYTES_EACH = {"TYPE_FP32": 4, "TYPE_INT64": 8, "TYPE_INT32": 4, "TYPE_BOOL": 1}


@dataclass(frozen=True)
class Watched:
    """Describes a model that is served."""

    name: str
    wanted: int  # Python processes; 0 where a backend of Triton's own runs it
    request: Any  # ModelInferRequest: nobody's, with zeros
    is_router: bool = False
    runs_on: str = "python"  # the backend


def watched_models(folder: Path, route: Route, configuration: str | None) -> dict[str, Watched]:
    """Lists the models of a route's releases, and its routers, in a mount; ReleaseError or OSError where one
    cannot be read. `configuration` is the one that tritonserver was told to prefer."""
    found = dict[str, Watched]()
    # Served fused, a router runs the canary in its own processes
    is_fused = configuration == "fused"
    for release in (route.main,) if is_fused else route.releases:
        for pipeline in contract.PIPELINES:
            if pipeline != contract.PIPELINE and not (folder / f"{release}_{pipeline}").exists():
                continue
            top = _config(folder, f"{release}_{pipeline}", configuration)
            steps = [step.model_name for step in top.ensemble_scheduling.step]
            for config in [_config(folder, step, configuration) for step in steps] or [top]:
                found[config.name] = _watched(config)
    for pipeline in contract.PIPELINES:
        router = router_of(route, pipeline)
        if router and (pipeline == contract.PIPELINE or (folder / router).exists()):
            found[router] = _watched(_config(folder, router, None), is_router=True)
    return found


def _config(folder: Path, model: str, configuration: str | None) -> Any:
    """Reads the configuration that tritonserver took for a model."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    preferred = folder / model / "configs" / f"{configuration}.pbtxt"
    path = preferred if configuration and preferred.exists() else folder / model / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except text_format.ParseError as error:
        raise ReleaseError(f"{path} cannot be read: {error}") from error
    config.name = model
    return config


def _watched(config: Any, *, is_router: bool = False) -> Watched:
    """Describes the model of a configuration."""
    wanted = sum(max(1, group.count) * max(1, len(group.gpus)) for group in config.instance_group)
    is_python = config.backend == "python"
    return Watched(
        config.name,
        max(1, wanted) if is_python else 0,
        _request(config, is_router=is_router),
        is_router,
        config.backend or config.platform.partition("_")[0],
    )


def _request(config: Any, *, is_router: bool) -> Any:
    """Makes a request of one row: nobody's id, and zeros for all else."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    request = service_pb2.ModelInferRequest(model_name=config.name)
    for tensor in config.input:
        kind = model_config_pb2.DataType.Name(tensor.data_type)
        shape, count = [1], 1
        for dim in tensor.dims:
            shape.append(max(1, dim))
            count *= max(1, dim)
        name = "BYTES" if kind == "TYPE_STRING" else kind.removeprefix("TYPE_")
        request.inputs.add(name=tensor.name, datatype=name, shape=shape)
        # Nobody's id is a text that can be searched for, but no picture
        is_picture = tensor.name == contract.CONTENTS[-1]
        request.raw_input_contents.append(bytes(4) if is_picture else _zeros(kind, count))
    if is_router:
        request.parameters[PROBE].bool_param = True
    return request


def _zeros(kind: str, count: int) -> bytes:
    """Gives the bytes of so many zeros, or of so many times nobody's id."""
    if kind == "TYPE_STRING":
        text = CANARY_USER.encode()
        return (struct.pack("<I", len(text)) + text) * count
    return bytes(_BYTES_EACH[kind] * count)

"""Refuses code that a release may bring along: what Triton runs of a release says only what Peregrine writes.

A config.pbtxt can name an interpreter of its own, a library or an agent that is loaded, or another file to
open; a stub beside a model.py is run in place of ours. So each file of a model must be one that we write, and
each field of its configuration one that we set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.contract import PIPELINES
from ensemble.errors import ReleaseError
from ensemble.release.release import Release
from ensemble.release.repository import MODEL_PY, alias_file

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

ALIAS_FILES = tuple(map(alias_file, PIPELINES))
CONFIGURATION = re.compile(r"config\.pbtxt|configs/[a-z0-9_-]+\.pbtxt")
CODE = "1/model.py"
_DATA = re.compile(r"1/model[a-z0-9_.-]*\.(onnx|plan)|warmup/[A-Za-z0-9_-]+")
_CODE_ENDS = (".py", ".pyc", ".so")
_CURE = "build the release again"
_FIELDS = {
    "name", "platform", "backend", "max_batch_size", "input", "output", "parameters", "instance_group",
    "dynamic_batching", "ensemble_scheduling", "default_model_filename", "optimization", "model_warmup",
}  # fmt: skip
_PARAMETERS = {"release", "step"}
_RUNNERS = {("python", ""), ("", "ensemble"), ("", "tensorrt_plan")}  # (backend, platform)


def check_release(release: Release) -> None:
    """Raises ReleaseError if a release brings code, or a configuration that would run some."""
    for path in release.manifest["files"]:
        try:
            _check_listed(release, path)
        except ReleaseError as error:
            raise ReleaseError(f"release {release.name}: {error.fact}", error.cure) from error


def _check_listed(release: Release, path: str) -> None:
    """Raises ReleaseError unless a listed file is one that Peregrine writes; data of its own folder may be
    any."""
    folder, _, relative = path.partition("/")
    file = release.repository / path
    if folder != release.name:
        check_file(file, folder, relative)
    elif relative in ALIAS_FILES:
        read_configuration(file, "")
    elif path.endswith(_CODE_ENDS):
        raise _foreign(file)


def check_file(file: Path, model: str, relative: str) -> None:
    """Raises ReleaseError unless a file of a model's folder is one that Peregrine writes."""
    if relative == CODE:
        read_code(file)
    elif CONFIGURATION.fullmatch(relative):
        read_configuration(file, model)
    elif not _DATA.fullmatch(relative):
        raise _foreign(file)


def read_code(file: Path) -> str:
    """Gives a model.py's text; ReleaseError unless it is the one that every model has."""
    text = _text(file)
    if not _is_ours(text):
        raise _foreign(file)
    return text


def read_configuration(file: Path, model: str) -> str:
    """Gives the text of a model's configuration, an alias's where `model` is empty; ReleaseError unless it
    could be ours."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    text = _text(file)
    try:
        config = text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise ReleaseError(f"{file} is no configuration of Triton: {error}", _CURE) from error
    if fault := next(_faults(config, model), ""):
        raise ReleaseError(f"{file}: {fault}, which Peregrine does not write", _CURE)
    return text


def _faults(config: ModelConfig, model: str) -> Iterator[str]:
    """Names what is in a configuration that we never set."""
    for field, _ in config.ListFields():
        if field.name not in _FIELDS:
            yield field.name
    for key in sorted(set(config.parameters) - _PARAMETERS):
        yield f"parameter {key}"
    if (config.backend, config.platform) not in _RUNNERS:
        yield f"backend {config.backend or config.platform!r}"
    if config.default_model_filename not in ("", "model.plan"):
        yield f"default_model_filename {config.default_model_filename!r}"
    if config.optimization.HasField("execution_accelerators"):
        yield "optimization.execution_accelerators"
    release = config.parameters["release"].string_value
    if model and (config.name != model or not model.startswith(f"{release}_")):
        yield f"name {config.name!r} of release {release!r}"
    for step in config.ensemble_scheduling.step:
        if not step.model_name.startswith(f"{release}_"):
            yield f"step {step.model_name!r}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReleaseError(f"cannot read {file}: {error.strerror}", _CURE) from error


def _is_ours(text: str) -> bool:
    """Says whether this is the model.py that every member has."""
    return text == MODEL_PY


def _foreign(file: Path) -> ReleaseError:
    return ReleaseError(f"{file} is code that Peregrine did not write", _CURE)

"""Loads a user's own torch module, and holds it against the contract before anything is trained."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from ensemble import contract
from ensemble.errors import InvalidInput
from ensemble.schema import Schema
from ensemble.spec import ModelSpec, TensorSpec

_TORCH = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
_BATCH = 3


@dataclass(frozen=True)
class OwnModel:
    """Names a user's own class in place of one of our models, and the state of its code."""

    source: str  # "module:Class"
    digest: str  # of the module's files: a changed module is another model (builders/keys.py)


def write_own(own: OwnModel | None, folder: Path) -> None:
    """Writes own.json beside a checkpoint: what its weights belong to."""
    (folder / "own.json").write_text(json.dumps(own and {"source": own.source, "digest": own.digest}))


def read_own(folder: Path) -> OwnModel | None:
    """Reads what write_own wrote."""
    entry = json.loads((folder / "own.json").read_text())
    return entry and OwnModel(**entry)


def open_own(own: OwnModel | None, schema: Schema, model: str) -> nn.Module | None:
    """Loads the user's own module in place of the contract's `model`; None where there is none."""
    return None if own is None else own_model(own.source, schema, contract.recommend(schema).model(model))


def import_own(source: str, *folders: Path) -> ModuleType:
    """Imports the module of "module:Class", looked for in `folders` first, then in the current folder."""
    before = [str(folder.resolve()) for folder in (*folders, Path.cwd())]
    sys.path[:0] = before
    try:
        return importlib.import_module(source.partition(":")[0])
    finally:
        for folder in before:
            sys.path.remove(folder)


def own_model(source: str, schema: Schema, model: ModelSpec) -> nn.Module:
    """Loads `source`, "module:Class": Class(schema) must be a module that takes and gives the contract's
    tensors.

    InvalidInput names the option, what was wanted and what came.
    """
    option = f"--{model.name.replace('_', '-')} {source}"
    module = own_module(option, source, schema=schema)
    check_own(option, module, model)
    return module


def own_module(where: str, source: str, *folders: Path, **arguments: object) -> nn.Module:
    """Makes the module of "module:Class", given `arguments` by place; InvalidInput begins with `where`."""
    attribute = source.partition(":")[2]
    places = " or ".join(str(folder) for folder in (*folders, Path.cwd()))
    try:
        kind = getattr(import_own(source, *folders), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise InvalidInput(
            f"{where}: cannot import it ({error}); give MODULE:CLASS, with MODULE importable from {places}"
        ) from None
    called = f"{attribute}({', '.join(arguments)})"
    try:
        module = kind(*arguments.values())
    except Exception as error:  # the user's code may raise anything
        raise InvalidInput(f"{where}: {called} fails: {type(error).__name__}: {error}") from None
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"{where}: {called} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def check_own(
    where: str, module: nn.Module, model: ModelSpec, feeds: dict[str, torch.Tensor] | None = None
) -> None:
    """Raises InvalidInput unless the module takes and gives the contract's tensors, tried on `feeds` or on
    zeros."""
    _check_names(where, module, model)
    _check_outputs(where, module, model, feeds or {s.name: example(s, _BATCH) for s in model.inputs})


def _check_names(option: str, module: nn.Module, model: ModelSpec) -> None:
    wanted = [spec.name for spec in model.inputs]
    have = list(inspect.signature(module.forward).parameters)
    if have != wanted:
        wrong = [n for n in wanted if n not in have] or [n for n in have if n not in wanted] or have
        contract = ", ".join(map(str, model.inputs))
        raise InvalidInput(
            f"{option}: forward({', '.join(have)}) differs at {', '.join(wrong)}; the contract wants "
            f"{contract}, in this order"
        )


def _check_outputs(option: str, module: nn.Module, model: ModelSpec, feeds: dict[str, torch.Tensor]) -> None:
    batch = len(next(iter(feeds.values())))
    try:
        with torch.no_grad():
            outputs = module.eval()(**feeds)
    except Exception as error:  # the user's code may raise anything
        raise InvalidInput(
            f"{option}: forward fails on tensors of the contract: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for spec, output in zip(model.outputs, outputs, strict=False):
        shape = (batch, *spec.dims)
        if not isinstance(output, torch.Tensor):
            raise InvalidInput(f"{option}: gives a {type(output).__name__} for {spec}, not a tensor")
        if tuple(output.shape) != shape or output.dtype != _TORCH[spec.dtype]:
            raise InvalidInput(
                f"{option}: gives {list(output.shape)} {output.dtype} for {spec}; the contract wants "
                f"{list(shape)} {spec.dtype}"
            )
    if len(outputs) != len(model.outputs):
        raise InvalidInput(
            f"{option}: gives {len(outputs)} tensors; the contract wants {', '.join(map(str, model.outputs))}"
        )


def example(spec: TensorSpec, batch: int) -> torch.Tensor:
    """Gives zeros of a tensor's shape; a mask is all true."""
    shape = (batch, *(dim or 1 for dim in spec.dims))
    return (
        torch.from_numpy(np.ones(shape, bool))
        if spec.dtype == "bool"
        else torch.zeros(shape, dtype=_TORCH[spec.dtype])
    )

"""A user's own torch module in place of ours: loaded, and held against the contract before anything is
trained."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensemble.errors import InvalidInput
from ensemble.schema import Schema
from ensemble.spec import ModelSpec, TensorSpec

_TORCH = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


def own_model(source: str, schema: Schema, model: ModelSpec) -> nn.Module:
    """`source` is "module:Class"; Class(schema) must be a module whose forward takes and gives the contract's
    tensors.

    InvalidInput names the option, what was wanted and what came.
    """
    option = f"--{model.name.replace('_', '-')} {source}"
    name, _, attribute = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        kind = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"{option}: cannot import it ({error}); give MODULE:CLASS, with MODULE importable from "
            f"{Path.cwd()}"
        ) from None
    finally:
        sys.path.pop(0)
    try:
        module = kind(schema)
    except Exception as error:  # the user's code may raise anything
        raise InvalidInput(f"{option}: {attribute}(schema) fails: {type(error).__name__}: {error}") from None
    if not isinstance(module, nn.Module):
        raise InvalidInput(
            f"{option}: {kind.__name__}(schema) gives a {type(module).__name__}, not a torch.nn.Module"
        )
    _check_names(option, module, model)
    _check_outputs(option, module, model)
    return module


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


def _check_outputs(option: str, module: nn.Module, model: ModelSpec) -> None:
    batch = 3
    try:
        with torch.no_grad():
            outputs = module.eval()(**{spec.name: example(spec, batch) for spec in model.inputs})
    except Exception as error:  # the user's code may raise anything
        raise InvalidInput(
            f"{option}: forward fails on tensors of the contract: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for spec, output in zip(model.outputs, outputs, strict=False):
        shape = (batch, *spec.dims)
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
    """Zeros of a tensor's shape (a mask is all true)."""
    shape = (batch, *(dim or 1 for dim in spec.dims))
    return (
        torch.from_numpy(np.ones(shape, bool))
        if spec.dtype == "bool"
        else torch.zeros(shape, dtype=_TORCH[spec.dtype])
    )

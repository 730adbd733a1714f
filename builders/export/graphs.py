"""Keeps exported graphs: tracing a module takes torch seconds, and only its shape decides what comes of it.

A graph is exported once with weights that are all different numbers, and kept in the user's cache under the
digest of all that it depends on: the module without the values of its parameters, the code that it runs, the
libraries. Each module of that shape is then given its own weights, and held against torch as ever.

    $XDG_CACHE_HOME/peregrine/graphs/<digest>.onnx        (~/.cache where that is not set)
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.export.reweight import reweighted
from builders.folders import SOURCES, only_one
from ensemble.arrays import Array
from ensemble.spec import ModelSpec

_MOST_WEIGHTS = 1 << 23  # that float32 tells apart
_MOST_BYTES = 1 << 29  # of kept graphs; those that nobody asked for the longest go first
_PARTIAL = ".partial"  # of one graph: who holds its lock overwrites what a killed export left
_NONE = b"no"  # what stands for a graph whose weights cannot be told apart


def from_kept_graph(
    module: nn.Module, model: ModelSpec, export: Callable[[nn.Module, Path], None]
) -> bytes | None:
    """Gives the ONNX model of `module` from the kept graph of its shape, which `export` makes where there is
    none.

    None where it has to be exported by itself: its code is not ours alone, or its weights cannot be placed.
    """
    key = _key(module, model)
    if key is None:
        return None
    folder = graphs_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}.onnx"
        template = _with_distinct_weights(module)
        with only_one(folder / f".{key}.lock", lambda: None):
            if not path.exists():
                _keep(template, module, path, export)
        os.utime(path)
        graph = path.read_bytes()
    except OSError:  # a read-only or full home: exported as before
        return None
    return None if graph == _NONE else reweighted(graph, _state(template), _state(module))


def graphs_folder() -> Path | None:
    """Gives the folder of kept graphs; None for a user without a home, as a service's may be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "peregrine" / "graphs" if os.path.isabs(home) else None


def _keep(
    template: nn.Module, module: nn.Module, path: Path, export: Callable[[nn.Module, Path], None]
) -> None:
    """Exports the template and writes it to `path`, or what says that it cannot be given other weights."""
    partial = path.with_suffix(_PARTIAL)
    try:
        export(template, partial)
        if reweighted(partial.read_bytes(), _state(template), _state(module)) is None:
            partial.write_bytes(_NONE)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    _remove_oldest(path.parent)


def _remove_oldest(folder: Path) -> None:
    """Removes the graphs that do not fit into _MOST_BYTES beside those asked for since."""
    room = _MOST_BYTES
    for stat, path in sorted(
        ((file.stat(), file) for file in folder.glob("*.onnx")), key=lambda f: -f[0].st_mtime
    ):
        room -= stat.st_size
        if room < 0:
            path.unlink(missing_ok=True)


def _key(module: nn.Module, model: ModelSpec) -> str | None:
    """Gives the digest of all that the exported graph depends on; None where that cannot be told."""
    from builders.keys import code_digest, library_versions  # no code of a stage: see there

    if not 0 < sum(weight.numel() for weight in _weights(module)) < _MOST_WEIGHTS:
        return None
    if not all(_is_ours(of) or of.__module__.startswith("torch.nn.") for of in map(type, module.modules())):
        return None
    skeleton = _skeleton(module)
    if skeleton is None:
        return None
    code = sorted({code_digest(of.__module__) for of in map(type, module.modules()) if _is_ours(of)})
    facts = (repr(model), code, code_digest("builders.export"), library_versions(), sys.version_info[:2])
    return hashlib.sha256(repr(facts).encode() + skeleton).hexdigest()[:32]


def _weights(module: nn.Module) -> list[torch.Tensor]:
    """Gives what a graph can be given anew: all float32 tensors of the module's state."""
    return [tensor for tensor in module.state_dict(keep_vars=True).values() if tensor.dtype == torch.float32]


def _is_ours(of: type) -> bool:
    module = sys.modules.get(of.__module__)
    file = getattr(module, "__file__", None)
    return of.__module__.startswith("builders.") and file is not None and Path(file).is_relative_to(SOURCES)


def _skeleton(module: nn.Module) -> bytes | None:
    """Gives all that a module is but the numbers of its weights; None where it holds what is not known
    here."""
    weights = {id(weight) for weight in _weights(module)}
    with suppress(TypeError, RecursionError):
        return repr(_described(module, weights)).encode()
    return None


def _described(thing: Any, weights: set[int]) -> Any:
    """Gives a thing as plain values that say all of it; TypeError where it cannot."""
    if thing is None or isinstance(thing, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return thing
    if isinstance(thing, torch.Tensor):
        if id(thing) in weights:
            return ("weight", tuple(thing.shape))
        return _described(thing.detach().numpy(), weights)
    if isinstance(thing, np.ndarray):
        return (thing.shape, str(thing.dtype), hashlib.sha256(thing.tobytes()).hexdigest())
    if isinstance(thing, (tuple, list)):
        return [_described(one, weights) for one in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted(repr(_described(one, weights)) for one in thing)
    if isinstance(thing, Mapping):
        return [(_described(key, weights), _described(one, weights)) for key, one in thing.items()]
    if isinstance(thing, (type, FunctionType, BuiltinFunctionType)) and "<" not in thing.__qualname__:
        return (thing.__module__, thing.__qualname__)  # one made within a function may hold anything
    if isinstance(thing, nn.Module) or is_dataclass(thing):
        return (_described(type(thing), weights), _described(vars(thing), weights))
    raise TypeError(f"{type(thing)} is not told apart from another one")


def _with_distinct_weights(module: nn.Module) -> nn.Module:
    """Gives a copy whose weights are all different small numbers, the same ones for each module of that
    shape."""
    template = copy.deepcopy(module)
    weights = _weights(template)
    ends = np.cumsum([weight.numel() for weight in weights])
    values = (1 + np.random.default_rng(0).permutation(ends[-1])).astype(np.float32) / np.float32(1 << 24)
    with torch.no_grad():
        for weight, part in zip(weights, np.split(values, ends[:-1]), strict=True):
            weight.copy_(torch.from_numpy(part).reshape(weight.shape))
    return template


def _state(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}

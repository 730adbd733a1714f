"""Exports torch modules as single-file ONNX models whose names, axes and dtypes are the contract's."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from builders.export.graphs import from_kept_graph
from builders.export.reweight import reweighted
from ensemble.arrays import Array
from ensemble.engines import check_signature, open_engine
from ensemble.errors import InvalidInput
from ensemble.spec import ModelSpec, TensorSpec

# fp32 on both sides: they differ by the order of sums only. Relative to the largest output, because logits
# near 0 have no scale.
FP32_TOLERANCE = 1e-4
EXAMPLE_BATCH = 3  # anything but 0 and 1, which torch.export would take for constants


def export_model(module: nn.Module, model: ModelSpec, path: Path, feeds: dict[str, Array]) -> float:
    """Writes `module` as ONNX to `path` and returns its largest relative error against torch on `feeds` (real
    inputs by name).

    ReleaseError when the exported tensors are not the contract's, InvalidInput when the numbers differ by
    more than FP32_TOLERANCE.
    """
    module = module.eval()
    data = from_kept_graph(module, model, lambda other, to: _trace(other, model, to, feeds))
    if data is not None:
        path.write_bytes(data)
        with contextlib.suppress(InvalidInput):  # a number that no weight's name tells: exported by itself
            return check_export(module, model, path, feeds)
    return export_alone(module, model, path, feeds)


def export_alone(module: nn.Module, model: ModelSpec, path: Path, feeds: dict[str, Array]) -> float:
    """Does export_model() without the graphs that are kept of other modules."""
    _trace(module.eval(), model, path, feeds)
    return check_export(module, model, path, feeds)


def _trace(module: nn.Module, model: ModelSpec, path: Path, feeds: dict[str, Array]) -> None:
    """Writes what torch's exporter makes of the module, with all of the contract's inputs."""
    arguments = {spec.name: torch.from_numpy(_example(feeds[spec.name])) for spec in model.inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
        _no_collector(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            kwargs=arguments,
            input_names=[spec.name for spec in model.inputs],
            output_names=[spec.name for spec in model.outputs],
            dynamic_shapes={spec.name: _dynamic_axes(spec) for spec in model.inputs},
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)
    _keep_unused_inputs(path, model)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Pauses Python's garbage collector: looking at the exporter's many objects takes a third of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def reweight_model(
    module: nn.Module,
    verified: nn.Module,
    exported: Path,
    model: ModelSpec,
    path: Path,
    feeds: dict[str, Array],
) -> float:
    """Does export_model() for `module`, which differs in its weights from `verified`, whose ONNX model is
    `exported` already."""
    before, after = (
        {name: t.detach().numpy() for name, t in of.state_dict().items()} for of in (verified, module)
    )
    data = reweighted(exported.read_bytes(), before, after)
    if data is None:
        return export_model(module, model, path, feeds)
    path.write_bytes(data)
    return check_export(module.eval(), model, path, feeds)


def check_export(module: nn.Module, model: ModelSpec, path: Path, feeds: dict[str, Array]) -> float:
    """Runs torch and the exported engine on the same feeds; returns the largest relative error."""
    engine = open_engine(path)
    check_signature(engine, model, path)
    names = [spec.name for spec in model.inputs]
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(feeds[name]) for name in names})
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = engine.run({name: feeds[name] for name in names})
    worst = 0.0
    for spec, tensor in zip(model.outputs, wanted, strict=True):
        array = tensor.numpy()
        error = float(np.abs(found[spec.name] - array).max() / max(1e-6, np.abs(array).max()))
        if not error <= FP32_TOLERANCE:
            raise InvalidInput(
                f"{model.name}: {spec.name} of the exported ONNX model differs from torch by {error:.1e} "
                f"(tolerance {FP32_TOLERANCE:.0e})"
            )
        worst = max(worst, error)
    return worst


def _dynamic_axes(spec: TensorSpec) -> dict[int, Any]:
    """Gives the axes that stay open: the batch, the candidates, as offline stages ask about few, and the
    tokens."""
    return {
        place: torch.export.Dim(axis.letter, min=1, max=65536)
        for place, axis in enumerate(spec.axes)
        if axis.letter in ("B", "N", "L")
    }


def _example(array: Array) -> Array:
    """Gives EXAMPLE_BATCH rows of a feed, repeated if there are fewer."""
    return np.ascontiguousarray(np.resize(array, (EXAMPLE_BATCH, *array.shape[1:])))


def _keep_unused_inputs(path: Path, model: ModelSpec) -> None:
    """Adds inputs that the exporter dropped as unread by the graph: the contract's are all there."""
    proto = onnx.load(str(path), load_external_data=False)
    have = {node.name for node in proto.graph.input}
    types = {
        "float32": onnx.TensorProto.FLOAT,
        "int64": onnx.TensorProto.INT64,
        "int32": onnx.TensorProto.INT32,
        "bool": onnx.TensorProto.BOOL,
    }
    missing = [spec for spec in model.inputs if spec.name not in have]
    if missing:
        proto.graph.input.extend(
            onnx.helper.make_tensor_value_info(s.name, types[s.dtype], ["B", *s.dims]) for s in missing
        )
        onnx.save(proto, str(path))

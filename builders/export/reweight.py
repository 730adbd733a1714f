"""Puts other weights of the same module into an exported ONNX model: a second export takes far longer.

The exporter keeps a weight under its own name, or transposes it (of a linear layer), or turns it around (a
bias by age), or lays its numbers out anew. Where a number of the verified weights has gone is read off its
value; where that is not certain, the model is exported again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from ensemble.arrays import Array

_FEWEST = 4  # numbers: fewer may stand elsewhere by chance


def reweighted(model: bytes, before: Mapping[str, Array], after: Mapping[str, Array]) -> bytes | None:
    """Gives the ONNX model of a module's weights `after`, from that of its weights `before`; both by name.

    None where a weight that has changed is not to be found, or might be two.
    """
    changed = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    proto = onnx.load_from_string(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    found: dict[str, Array] = {}
    unnamed = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if name not in before and tensor.data_type == onnx.TensorProto.FLOAT
    }
    for name in changed:
        if name in tensors:
            places = {name: after[name]} if _same(numpy_helper.to_array(tensors[name]), before[name]) else {}
        else:
            places = _places(unnamed, before[name], after[name])
        if len(places) != 1 or found.keys() & places.keys():
            return None
        found |= places
    for name, array in found.items():
        tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(array, order="C"), name))
    return proto.SerializeToString()


def _places(unnamed: Mapping[str, Array], before: Array, after: Array) -> dict[str, Array]:
    """Gives each initializer that holds the weight's numbers `before` in some layout, with those of `after`
    in that layout."""
    order = np.argsort(before, axis=None, kind="stable")
    values, new = before.ravel()[order], after.ravel()[order]
    # where equal numbers have become different ones, nobody can say which stood where
    is_certain = ((values[1:] != values[:-1]) | (new[1:] == new[:-1])).all()
    places = {}
    for name, array in unnamed.items():
        if before.ndim == 2 and _same(array, before.T):
            places[name] = after.T
        elif _is_turned(array, before):
            places[name] = after[..., ::-1].reshape(array.shape)
        elif array.size >= _FEWEST and is_certain:
            at = np.searchsorted(values, array).clip(max=len(values) - 1)
            if (values[at] == array).all():
                places[name] = new[at]
    return places


def _is_turned(array: Array, before: Array) -> bool:
    """Says whether an array has a weight's numbers with the last axis turned around, and could not have them
    in their own order."""
    if array.size != before.size or array.size < _FEWEST:
        return False
    return np.array_equal(array.ravel(), before[..., ::-1].ravel()) and not np.array_equal(
        before, before[..., ::-1]
    )


def _same(first: Array, second: Array) -> bool:
    """Says whether two arrays are equal in shape and bits."""
    return first.shape == second.shape and np.array_equal(first, second)

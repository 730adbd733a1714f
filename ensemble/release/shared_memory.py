"""Says how large /dev/shm must be for a release: Triton and its Python processes pass every tensor there."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ensemble import contract
from ensemble.contract import CONTENTS, MAX_PICTURES, MAX_PICTURES_BYTES, MAX_TEXT_BYTES
from ensemble.id_rule import MAX_ID_BYTES
from ensemble.schema import Schema
from ensemble.spec import ModelSpec, TensorSpec

_MIB = 1 << 20
_BASE = _MIB  # each process's region begins with so much, and grows by as much
# Of a batch: while one is answered, the next one's tensors may come
_BATCHES = 2
# While one release is turned into another both are loaded
_RELEASES = 2
_BYTES = {"float32": 4, "int64": 8, "int32": 4, "bool": 1}
_CONTENTS = dict(zip(CONTENTS, (MAX_TEXT_BYTES, MAX_PICTURES_BYTES // MAX_PICTURES), strict=True))


def shm_bytes(schema: Schema, *, fused: bool = False, instances: int | None = None) -> int:
    """Gives the bytes that full batches of the largest requests may take, in all processes of two releases.

    `fused` and `instances` as `serve` is told. It is a bound: what is not asked for is not taken.
    """
    regions = sum(
        (instances or model.instances) * _region(model, schema) for model in _models(schema, fused=fused)
    )
    return _RELEASES * regions


def _models(schema: Schema, *, fused: bool) -> Iterator[ModelSpec]:
    """Lists the models that have processes: the steps, and the router of a canary's time, which takes and
    gives what its pipeline does."""
    pipelines = [pipeline.fused for pipeline in contract.pipelines(schema)]
    yield from pipelines
    yield from (*pipelines, *contract.beside(schema)) if fused else contract.members(schema)


def _region(model: ModelSpec, schema: Schema) -> int:
    """Gives the bytes of one process's region, in whole MiB."""
    row = sum(_row_bytes(tensor, schema) for tensor in (*model.inputs, *model.outputs))
    return math.ceil((_BASE + _BATCHES * schema.sizes.max_batch * row) / _MIB) * _MIB


def _row_bytes(tensor: TensorSpec, schema: Schema) -> int:
    """Gives the bytes of one row of a tensor; ids and contents at their longest."""
    values = math.prod(schema.sizes.max_top_k if dim is None else dim for dim in tensor.dims)
    return values * (_BYTES.get(tensor.dtype) or _CONTENTS.get(tensor.name, MAX_ID_BYTES))

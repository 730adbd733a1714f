"""Encodes the context columns of the interactions, as requests will be (ensemble/context.py)."""

from __future__ import annotations

import numpy as np

from builders.data.packing import pack_features
from builders.shop.columns.column import Column
from builders.shop.shop_toml import ContextColumn, FeatureColumn
from ensemble.arrays import Array
from ensemble.schema import ContextFeature


def contexts_from_columns(
    entries: list[ContextColumn], columns: dict[str, Column], num_rows: int
) -> tuple[tuple[ContextFeature, ...], Array]:
    """Gives the features of the schema, and what each row's cells say [n, X] float32, NaN where empty."""
    features = [
        FeatureColumn(
            name=one.name,
            kind=one.kind,
            column=one.column,
            width=1,
            vocabulary=one.vocabulary,
            log1p=one.log1p,
        )
        for one in entries
    ]
    packed = pack_features(features, columns, np.arange(1, num_rows + 1), num_rows, {})
    contexts = np.full((num_rows, len(entries)), np.nan, np.float32)
    found, numbers = [], 0
    for at, (feature, encoding) in enumerate(zip(packed.table.features, packed.encoding, strict=True)):
        if feature.kind == "category":
            codes = packed.codes[1:, feature.start]
            contexts[:, at] = np.where(codes > 0, codes - feature.offset, np.nan)
            found.append(ContextFeature(feature.name, "category", tuple(packed.vocabularies[feature.name])))
            continue
        is_empty = np.isnan(packed.numbers[1:, numbers])
        contexts[:, at] = np.where(is_empty, np.nan, packed.values[1:, feature.start])
        mean, deviation = (float(encoding[name][0]) for name in ("mean", "deviation"))
        found.append(ContextFeature(feature.name, "number", (), encoding["log1p"], mean, deviation))
        numbers += 1
    return tuple(found), contexts

"""Packs rows of users and items: fixed width, memory-mapped, one gather for a whole batch."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.schema import Schema


def item_dtype(schema: Schema) -> np.dtype:
    """Gives the dtype of one item's row.

    Its fields are embedding [D] and features [F], both from the item_encoder, and codes [C] and values [R]
    from the catalogue.
    """
    sizes = schema.sizes
    return np.dtype(
        [
            ("embedding", "<f4", (sizes.embedding,)),
            ("features", "<f4", (sizes.item_features,)),
            ("codes", "<i4", (schema.items.code_width,)),
            ("values", "<f4", (schema.items.value_width,)),
        ]
    )


def user_dtype(schema: Schema) -> np.dtype:
    """Gives the dtype of one user's row.

    Its fields are seen, item rows [W] oldest first and left-padded with -1, with the Unix seconds (or
    positions) seen_times [W] and kinds seen_kinds [W] of these events, 0 where padded; features [U], which
    are learned; codes [C]; values [R]; rates, the last columns of user_state.
    """
    sizes = schema.sizes
    return np.dtype(
        [
            ("seen", "<i4", (sizes.seen,)),
            ("seen_times", "<u4", (sizes.seen,)),
            ("seen_kinds", "u1", (sizes.seen,)),
            ("features", "<f4", (sizes.user_features,)),
            ("codes", "<i4", (schema.users.code_width,)),
            ("values", "<f4", (schema.users.value_width,)),
            ("rates", "<f4", (sizes.user_rates,)),
        ]
    )


def gather(rows: Array, table: Array, field: str) -> Array:
    """Gathers a field of the packed `table` at rows [...] int64 -> [..., width], contiguous; 0 where a row is
    negative.

    Indexing the field's view copies each row's field once; np.take would first copy the whole table.
    """
    padded = rows < 0
    if not padded.any():
        return table[field][rows]
    out = table[field][np.where(padded, 0, rows)]
    out[padded] = 0
    return out

"""Makes numbers of the context of a request or an exposure (device, hour, placement, ...), for the ranker.

A context is a row of X numbers, one a feature of the schema: a category's place in its values from 1 (0 = a
value that the release does not know), a number standardized; NaN where nothing is said. The ranker reads them
as columns of user_state:

    category   one column for each value, the first for unknown ones: 1 for the one that is said
    number     1 if it is said; the number

Absent is 0 in all columns, which training sees as well: it hides some contexts.

Axes: B batch, X context features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidArgument
from ensemble.json_values import is_number, object_of, short
from ensemble.schema import ContextFeature, Schema

MOST_DEVIATIONS = 10.0  # numbers are cut here, as those of items and users are


@dataclass(frozen=True)
class Context:
    """Holds what a request says of its moment."""

    values: tuple[float | None, ...] = ()  # one a feature of the schema; () says nothing of any
    is_known: bool = True  # False: something that it says is nothing that the release knows


NO_CONTEXT = Context()


def context_width(schema: Schema) -> int:
    """Counts the columns of user_state that tell a context."""
    return sum(feature.width for feature in schema.context)


def context_state(schema: Schema, contexts: Array) -> Array:
    """Spreads contexts [B, X] (NaN = absent) over columns: [B, context_width] float32."""
    out = np.zeros((len(contexts), context_width(schema)), np.float32)
    start = 0
    for at, feature in enumerate(schema.context):
        said = np.flatnonzero(~np.isnan(contexts[:, at]))
        values = contexts[said, at]
        if feature.kind == "category":
            out[said, start + values.astype(np.int64)] = 1
        else:
            out[said, start], out[said, start + 1] = 1, values
        start += feature.width
    return out


def read_context(name: str, value: Any, schema: Schema) -> Context:
    """Reads a context such as {"device": "phone", "hour": 13}; InvalidArgument names what is wrong.

    A release whose shop has none takes any, and says so in the answer's `degraded`: so one can go back to it
    while clients send theirs.
    """
    if not schema.context:
        anything = object_of(name, value, {*value} if isinstance(value, dict) else set(), "")
        return Context((), not anything)
    object_of(name, value, {feature.name for feature in schema.context}, "context feature")
    if all(one is None for one in value.values()):
        return NO_CONTEXT
    read = [_context_value(name, feature, value.get(feature.name)) for feature in schema.context]
    is_known = all(
        one != 0 or feature.kind == "number" for one, feature in zip(read, schema.context, strict=True)
    )
    return Context(tuple(read), is_known)


def _context_value(name: str, feature: ContextFeature, value: Any) -> float | None:
    """Gives a context feature's value as the ranker reads it; None where nothing is said. Texts of numbers
    pass as numbers, whole numbers as a category's text."""
    if value is None:
        return None
    if feature.kind == "category":
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise InvalidArgument(
                f"{name}: {feature.name!r} is a category and wants a string, got {short(value)}"
            )
        return float(feature.values.index(text) + 1 if (text := str(value)) in feature.values else 0)
    try:
        number = float(value) if isinstance(value, str) else value
        if not is_number(number):
            raise ValueError("not finite")
        return _standardized(feature, float(number))
    except ValueError:
        wanted = "a finite number from 0" if feature.log1p else "a finite number"
        raise InvalidArgument(f"{name}: {feature.name!r} wants {wanted}, got {short(value)}") from None


def _standardized(feature: ContextFeature, value: float) -> float:
    """Gives a number as training saw it; ValueError where it has no logarithm."""
    if feature.log1p and value < 0:
        raise ValueError("log1p wants 0 or more")
    value = math.log1p(value) if feature.log1p else value
    return min(max((value - feature.mean) / feature.deviation, -MOST_DEVIATIONS), MOST_DEVIATIONS)

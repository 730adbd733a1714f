"""Writes what programs read: strict JSON, which knows neither NaN nor infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_text(value: Any, **style: Any) -> str:
    """Writes a value as JSON, with null for NaN and infinities; `style` is json.dumps's (indent, …)."""
    return json.dumps(_finite(value), allow_nan=False, **style)


def _finite(value: Any) -> Any:
    """Puts None in place of every number that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_finite(one) for one in value]
    return value

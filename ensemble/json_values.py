"""Checks values that came as JSON, for errors that name the field."""

from __future__ import annotations

import json
import math
from typing import Any

from ensemble.errors import InvalidArgument


def object_of(name: str, value: Any, known: set[str], what: str) -> list[tuple[str, Any]]:
    """Gives the pairs of a JSON object; InvalidArgument if it is none, or has another key than `known`."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name}: must be a JSON object, got {short(value)}")
    for key in value:
        if key not in known:
            raise InvalidArgument(
                f"{name}: no {what} {short(key)}", f"known: {', '.join(sorted(known)) or 'none'}"
            )
    return list(value.items())


def is_number(value: Any) -> bool:
    """Says whether a value is a finite number, and no bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    # math.isfinite cannot take an int of any size.
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def short(value: Any) -> str:
    """Writes a value as JSON, cut to 40 letters, for an error."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 40 else text[:37] + "..."

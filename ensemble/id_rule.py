"""Holds every id, of users and of items, to one rule and one wording, wherever it comes in.

An id is UTF-8 text of 1 to MAX_ID_BYTES bytes without NUL: NumPy would drop a NUL at the end and find another
item. A request may name nobody: there an empty id is good, and is answered with a cold list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidArgument

MAX_ID_BYTES = 128
MISSING_WORDS = ("", "nan", "null", "none", "<na>", "n/a")  # in any case, what says that there is none
MISSING_AS_WRITTEN = ("NA",)  # R's word; na and Na may be names
_SHOWN = 40  # characters of a wrong value in an error


def encode_id(field: str, value: Any, *, may_be_empty: bool = False) -> bytes:
    """Gives the bytes of one id, an integer as its decimal text; InvalidArgument names field and rule."""
    try:
        encoded = value.encode() if isinstance(value, str) else _bytes_from_others(field, value)
    except UnicodeError:
        raise InvalidArgument(f"{field}: an id must be valid UTF-8, got {_shown(value)}") from None
    is_good = 0 < len(encoded) <= MAX_ID_BYTES and b"\0" not in encoded
    if not is_good and (encoded or not may_be_empty):
        raise InvalidArgument(f"{field}: {id_fault(encoded)}")
    return encoded


def recorded_id(field: str, value: Any) -> bytes:
    """Gives the bytes of an id that somebody's log or program recorded, mended as a shop's files are: no
    blanks at its ends, a whole float as a whole number; InvalidArgument where it says that there is none."""
    if isinstance(value, (float, np.floating)):
        value = int(value) if float(value).is_integer() and abs(float(value)) <= 2**53 else value
    value = value.strip() if isinstance(value, (str, bytes)) else value
    word = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    is_missing = word.lower() in MISSING_WORDS or word in MISSING_AS_WRITTEN
    if word and value is not None and is_missing:
        raise InvalidArgument(f"{field}: the id is missing, got {_shown(value)}")
    return encode_id(field, value)


def _bytes_from_others(field: str, value: Any) -> bytes:
    """Gives the bytes of an id that came as bytes or as an integer."""
    if isinstance(value, bytes):
        value.decode()
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value).encode()
    raise InvalidArgument(f"{field}: an id must be a string or an integer, got {_shown(value)}")


def encode_ids(field: str, ids: list[bytes]) -> Array:
    """Gives a request's ids, which came as bytes, as [n] S; InvalidArgument as encode_id raises it."""
    joined = b"\n".join(ids)  # One check for all: no UTF-8 sequence spans a newline.
    try:
        joined.decode()
        good = b"\0" not in joined and max(map(len, ids), default=0) <= MAX_ID_BYTES
    except UnicodeDecodeError:
        good = False
    if not good:
        for one in ids:
            encode_id(field, one, may_be_empty=True)
    return np.array(ids, dtype="S")


def id_fault(encoded: bytes) -> str:
    """Says what keeps UTF-8 bytes from being an id; empty for an id."""
    if len(encoded) > MAX_ID_BYTES:
        return f"an id must have at most {MAX_ID_BYTES} bytes, got {len(encoded)}"
    if b"\0" in encoded:
        return "an id must hold no NUL byte"
    return "" if encoded else "an id must not be empty"


def _shown(value: Any) -> str:
    """Gives a wrong value as it stands in an error, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

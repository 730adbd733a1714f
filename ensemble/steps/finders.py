"""Names what can find an item for a query, as bits of candidate_finders and as words of the answer."""

from __future__ import annotations

from enum import IntFlag
from functools import lru_cache


class Finder(IntFlag):
    """Says in bits which sources brought an item."""

    WORDS = 1  # words of its title
    TEXT = 2  # what its text means
    IMAGE = 4  # what its picture shows, of a picture
    SHOWN = 8  # what its picture shows, of a text
    TOLD = 16  # what its text tells, of a picture


@lru_cache(maxsize=32)
def names_of(bits: int) -> bytes:
    """Gives the names of finders, such as b"words,text"."""
    return ",".join(str(one.name).lower() for one in Finder if bits & one).encode()

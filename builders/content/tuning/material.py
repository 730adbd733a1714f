"""Holds what encoders are tuned on: items with all of their views, and which were clicked together.

Axes: n items, m pairs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from builders.content.sources import Source
from ensemble.arrays import Array

HELD_OUT = 10  # one item in so many, by a hash of its id, teaches nothing


@dataclass(frozen=True)
class View:
    """Holds one kind of what items say or show: the encoder that reads it, and each item's own input."""

    feature: str
    source: Source
    keys: Array  # [n] int64: equal for equal inputs
    read: Callable[[Sequence[int]], list[Any]]  # texts, or the bytes of pictures' files, of some items

    def at(self, chosen: Array) -> View:
        """Gives the view of some of the items [k] int64."""
        return replace(
            self, keys=self.keys[chosen], read=lambda places: self.read(chosen[list(places)].tolist())
        )


@dataclass(frozen=True)
class Material:
    """Holds n items that have every view, texts first."""

    views: tuple[View, ...]
    held: Array  # [n] bool: teaches nothing, and judges
    groups: Array  # [n] int64: items of one group are alike, hence hard to tell apart; -1: of none
    together: Array  # [m, 2] int64: items that one user took within a short time, no held-out ones

    def __len__(self) -> int:
        return len(self.held)

    def at(self, chosen: Array) -> Material:
        """Gives some of the items [k] int64."""
        place = np.full(len(self), -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        together = place[self.together]
        return Material(
            tuple(view.at(chosen) for view in self.views),
            self.held[chosen],
            self.groups[chosen],
            together[(together >= 0).all(axis=1)],
        )


def is_held_out(item_ids: Sequence[bytes]) -> Array:
    """Says which items [n] judge what is tuned."""
    return np.array([zlib.crc32(b"tune " + one) % HELD_OUT == 0 for one in item_ids], bool)


def numbered(keys: Sequence[Any]) -> Array:
    """Gives equal things equal numbers: [n] int64."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)

"""Holds the space that titles and pictures share: a linear map a kind, of what an item's row holds of it.

A map reads the components that rows hold already, so a live item, a merge and another release need nothing
more than the row, and a query nothing more than its own vector. builders/search/shared_space.py trains them,
or, of encoders whose own vectors share a space, computes them.

Axes: n rows, P components of a feature in a row, D components of the space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.content.projection import read_by_feature, save_by_feature

SHARED = "shared_space.npz"  # file of a release: the heads of both features


@dataclass(frozen=True)
class Head:
    """Holds one feature's map: matrix [P, D] and bias [D], float32."""

    matrix: Array
    bias: Array

    def unit(self, rows: Array) -> Array:
        """Maps rows [n, P] float32 of length 1: [n, D] float32 of length 1, 0 where a row is all 0."""
        placed = rows @ self.matrix + self.bias
        placed /= np.maximum(np.linalg.norm(placed, axis=1, keepdims=True), 1e-9)
        return np.ascontiguousarray(placed * rows.any(axis=1, keepdims=True), np.float32)


def save_heads(heads: Mapping[str, Head], path: Path) -> None:
    """Writes heads by feature; read_heads reads them."""
    save_by_feature(heads, path)


def read_heads(path: Path) -> dict[str, Head]:
    """Reads what save_heads wrote."""
    return read_by_feature(Head, path)

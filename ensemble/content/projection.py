"""Makes the few components that an item's row holds of a content vector: its principal ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

_Part = TypeVar("_Part")
PROJECTIONS = "projections.npz"  # file of a release: those of all its features


@dataclass(frozen=True)
class Projection:
    """Holds mean [V] and components [P, V], float32, scaled to a mean variance of 1."""

    mean: Array
    components: Array

    def values(self, vectors: Array, present: Array) -> Array:
        """Gives the columns [n, P + 1] float32 of vectors [n, V]: the components, then 1 where there is none.

        A model's weight for that last column is the vector that it learns for what is absent.
        """
        out = np.zeros((len(vectors), len(self.components) + 1), np.float32)
        out[present, :-1] = (vectors[present] - self.mean) @ self.components.T
        out[~present, -1] = 1
        return out


def fitted_projection(vectors: Array, width: int) -> Projection:
    """Fits the `width` first principal components, or as many as there are, of vectors [n, V]."""
    dim = vectors.shape[1]
    if len(vectors) < 2:
        return Projection(np.zeros(dim, np.float32), np.zeros((1, dim), np.float32))
    wide = vectors.astype(np.float64)
    mean = wide.mean(axis=0)
    variances, axes = np.linalg.eigh(np.cov(wide.T, bias=True))
    kept = np.argsort(-variances, kind="stable")[: min(width, dim, len(vectors) - 1)]
    components = axes[:, kept].T
    peaks = components[np.arange(len(kept)), np.abs(components).argmax(axis=1)]
    components *= np.sign(peaks)[:, None]  # eigenvectors have no sign of their own
    scale = np.sqrt(max(float(variances[kept].mean()), 1e-12))
    return Projection(mean.astype(np.float32), (components / scale).astype(np.float32))


def save_by_feature(parts: Mapping[str, Any], path: Path) -> None:
    """Writes dataclasses of arrays by feature; read_by_feature reads them."""
    arrays = {f"{name}.{part}": array for name, of in parts.items() for part, array in vars(of).items()}
    np.savez(path, **arrays)


def read_by_feature(kind: type[_Part], path: Path) -> dict[str, _Part]:
    """Reads what save_by_feature wrote; ReleaseError where it is none of that."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: dict[str, Array]() for name in sorted({key.rpartition(".")[0] for key in file})}
            for key in file:
                name, _, part = key.rpartition(".")
                parts[name][part] = file[key]
        return {name: kind(**arrays) for name, arrays in parts.items()}
    except (OSError, ValueError, TypeError) as error:
        raise ReleaseError(f"{path} cannot be read: {error}", "build the release again") from error


def save_projections(projections: Mapping[str, Projection], path: Path) -> None:
    """Writes projections by feature; read_projections reads them."""
    save_by_feature(projections, path)


def read_projections(path: Path) -> dict[str, Projection]:
    """Reads what save_projections wrote."""
    return read_by_feature(Projection, path)

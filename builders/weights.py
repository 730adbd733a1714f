"""Saves torch weights as plain .npz files, which run no code when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ensemble.arrays import Array
from ensemble.errors import InvalidInput


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors by name into one .npz file."""
    np.savez(
        path,
        **{
            name: tensor.detach().float().numpy()
            if tensor.dtype == torch.bfloat16
            else tensor.detach().numpy()
            for name, tensor in state.items()
        },
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Reads what save_state wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}


def require_finite(what: str, arrays: Mapping[str, torch.Tensor | Array]) -> None:
    """Raises InvalidInput with the name of the first weights that are not all finite numbers."""
    for name, weights in arrays.items():
        if not bool(torch.isfinite(torch.as_tensor(weights)).all()):
            raise InvalidInput(f"{what}: training ended with {name} not finite; lower its learning rate")

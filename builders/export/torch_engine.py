"""Runs a trained module as an engine is run, without an export: for judging what may not be kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ensemble.arrays import Tensors
from ensemble.spec import ModelSpec


class TorchEngine:
    """Gives what the module's exported engine would, but for the last bits."""

    def __init__(self, module: nn.Module, model: ModelSpec) -> None:
        self._module, self._model = module.eval(), model

    def run(self, feeds: Tensors) -> Tensors:
        """Turns arrays by name into arrays by name; the first axis is the batch."""
        with torch.no_grad():
            found = self._module(
                **{
                    one.name: torch.from_numpy(np.ascontiguousarray(feeds[one.name]))
                    for one in self._model.inputs
                }
            )
        found = found if isinstance(found, tuple) else (found,)
        return {one.name: tensor.numpy() for one, tensor in zip(self._model.outputs, found, strict=True)}

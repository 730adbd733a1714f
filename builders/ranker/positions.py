"""Learns how much the place where an item was shown adds to each task's logit, beside what user and item say.

What stands first is looked at more, so it is clicked more, whatever it is: a ranker that does not know the
place takes it for the item's merit (Joachims et al. 2017). Here each place has a number a task that is added
to the ranker's logit in training (the shallow tower of Zhao et al. 2019, section 4.2; PAL, Guo et al. 2019,
multiplies probabilities instead). It is no part of the ranker, whose graph never asks for a place. Served is
the place "unknown", which adds 0: some places are hidden in training, so that it stands for the places of the
log taken together, and probabilities mean what they mean in a shop that logs none.

Axes: L lists, N items a list, E impressions, P places (builders/data/places.py), T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.data.places import NUM_PLACES, place_rates, places_of
from builders.ranker import calibrate
from ensemble.arrays import Array
from ensemble.schema import Task

POSITIONS = "positions.npz"


class PositionBias(nn.Module):
    """Holds what each place adds to each task's logit."""

    def __init__(self, num_tasks: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(NUM_PLACES, num_tasks))

    def forward(self, places: Tensor) -> Tensor:
        """Gives what places [L, N] uint8 add to the logits: [L, N, T] float32, 0 where unknown."""
        known = (places > 0).unsqueeze(-1)
        return functional.embedding(places.long(), self.table) * known

    def start(self, tasks: tuple[Task, ...], places: Array, labels: Array) -> None:
        """Begins at how often each place led to each task's event, in log odds: places [E], labels [E, T]."""
        rates = place_rates(tasks, places, labels)
        odds = np.log(rates / (1 - rates))
        shown = np.bincount(places, minlength=NUM_PLACES)[1:, None] * np.isfinite(odds[1:])
        mean = (np.nan_to_num(odds[1:]) * shown).sum(0) / np.maximum(shown.sum(0), 1)
        self.table.data.copy_(torch.from_numpy(np.nan_to_num(odds - mean).astype(np.float32)))


@dataclass(frozen=True)
class Positions:
    """Says what a place does to a served value: value' = scale value + slope learned[place] + offset, in log
    odds for a probability. `learned` [P, T] float32 is what training added; the others [T] are fitted on
    held-out exposures, as the served calibration is, which knows no places."""

    learned: Array
    scale: Array
    slope: Array
    offset: Array

    def apply(self, tasks: tuple[Task, ...], values: Array, positions: Array) -> Array:
        """Gives the values [E, T] that exposures at `positions` [E] have, of the served ones; those at
        unknown places stay."""
        places = places_of(positions)
        binary = np.array([task.kind == "binary" for task in tasks])
        clipped = np.clip(values.astype(np.float64), 1e-7, 1 - 1e-7)
        plain = np.where(binary, np.log(clipped) - np.log1p(-clipped), values)
        moved = self.scale * plain + self.slope * self.learned[places] + self.offset
        moved = np.where(binary, 1 / (1 + np.exp(-moved)), moved)
        return np.where((places > 0)[:, None], moved, values).astype(np.float32)


def fit_positions(
    tasks: tuple[Task, ...],
    learned: Array,
    served: tuple[Array, Array],
    logits: Array,
    places: Array,
    labels: Array,
) -> Positions:
    """Fits the map of a served value to one at a place: `served` are scale and bias [T] of the calibration of
    logits [E, T] that know no places; labels [E, T], places [E] of held-out exposures."""
    known = places > 0
    if not known.any():
        return Positions(learned, np.ones_like(served[0]), served[0].copy(), np.zeros_like(served[0]))
    slope, bias = calibrate.fit(tasks, logits[known] + learned[places[known]], labels[known])
    scale = slope / served[0]
    return Positions(learned, scale, slope, bias - scale * served[1])


def save_positions(positions: Positions | None, folder: Path) -> None:
    """Writes positions.npz, where the shop logs places."""
    if positions is not None:
        np.savez(folder / POSITIONS, **vars(positions))


def read_positions(folder: Path) -> Positions | None:
    """Reads what save_positions wrote; None where nothing was."""
    if not (folder / POSITIONS).is_file():
        return None
    with np.load(folder / POSITIONS, allow_pickle=False) as arrays:
        return Positions(**arrays)

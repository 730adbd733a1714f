"""Learns how much the place where an item was shown adds to each task's logit, beside what user and item say.

What stands first is looked at more, so it is clicked more, whatever it is: a ranker that does not know the
place takes it for the item's merit (Joachims et al. 2017). Here each place has a number a task that is added
to the ranker's logit in training (the shallow tower of Zhao et al. 2019, section 4.2; PAL, Guo et al. 2019,
multiplies probabilities instead). It is no part of the ranker, whose graph never asks for a place. Served is
the place "unknown", which adds 0: some places are hidden in training, so that it stands for the places of the
log taken together, and probabilities mean what they mean in a shop that logs none.

A place says less of what the user knows: an item that was just touched has been looked at, wherever it
stands. So each place has a number for each of four facts, and adds those that hold.

Axes: L lists, N items a list, E impressions, P places (builders/data/places.py), J facts, T tasks.
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
from ensemble.schema import Schema, Task

POSITIONS = "positions.npz"
NUM_FACTS = 4  # of place_facts


def place_facts(schema: Schema, user_state: Array, candidate_state: Array) -> Array:
    """Gives the facts [..., J] float32 that say how much a place matters, of user_state [..., A] and
    candidate_state [..., G]: always; that the user has met the item, and one over how many events ago; that
    the user has no past."""
    met, ago = candidate_state[..., -1] > 0, candidate_state[..., -2]
    no_past = (user_state[..., 1 : 2 * len(schema.events) : 2] == 0).all(axis=-1)  # log counts of each kind
    return np.stack(np.broadcast_arrays(np.float32(1), met, ago, no_past), axis=-1).astype(np.float32)


def _added(learned: Array, places: Array, facts: Array) -> Array:
    """Gives what places [E] add where facts [E, J] hold: [E, T]."""
    return np.einsum("ejt,ej->et", learned[places], facts)


class PositionBias(nn.Module):
    """Holds what each place adds to each task's logit."""

    def __init__(self, num_tasks: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(NUM_PLACES, NUM_FACTS * num_tasks))

    def forward(self, places: Tensor, facts: Tensor) -> Tensor:
        """Gives what places [L, N] uint8 add to the logits where facts [L, N, J] float32 hold: [L, N, T]
        float32, 0 where the place is unknown."""
        known = (places > 0).unsqueeze(-1)
        numbers = functional.embedding(places.long(), self.table).unflatten(-1, (NUM_FACTS, -1))
        return (numbers * facts.unsqueeze(-1)).sum(-2) * known

    @property
    def learned(self) -> Array:
        """Gives the numbers [P, J, T] float32."""
        return self.table.detach().numpy().reshape(NUM_PLACES, NUM_FACTS, -1).copy()

    def start(self, tasks: tuple[Task, ...], places: Array, facts: Array, labels: Array) -> None:
        """Begins at how often each place led to each task's event, in log odds, for items that the user had
        met and for others: places [E], facts [E, J], labels [E, T]."""
        met = facts[:, 1] > 0
        others, known = (
            _place_odds(tasks, places[rows], labels[rows])
            for rows in (np.flatnonzero(~met), np.flatnonzero(met))
        )
        numbers = np.zeros((NUM_PLACES, NUM_FACTS, len(tasks)), np.float32)
        numbers[:, 0], numbers[:, 1] = others, known - others
        self.table.data.copy_(torch.from_numpy(numbers.reshape(NUM_PLACES, -1)))


def _place_odds(tasks: tuple[Task, ...], places: Array, labels: Array) -> Array:
    """Gives the log odds of each task's event in each place, above all exposures': [P, T]; 0 where it is
    unknown."""
    rates = place_rates(tasks, places, labels)
    odds = np.log(rates / (1 - rates))
    shown = np.bincount(places, minlength=NUM_PLACES)[:, None] * np.isfinite(odds)
    return np.nan_to_num(odds - (np.nan_to_num(odds) * shown).sum(0) / np.maximum(shown.sum(0), 1))


@dataclass(frozen=True)
class Positions:
    """Says what a place does to a served value: value' = scale value + slope added + offset, in log odds
    for a probability. `learned` [P, J, T] float32 is what training adds; the others [T] are fitted on
    held-out exposures, as the served calibration is, which knows no places."""

    learned: Array
    scale: Array
    slope: Array
    offset: Array

    def apply(self, tasks: tuple[Task, ...], values: Array, positions: Array, facts: Array) -> Array:
        """Gives the values [E, T] that exposures at `positions` [E], with facts [E, J], have, of the
        served ones; those at unknown places stay."""
        places = places_of(positions)
        binary = np.array([task.kind == "binary" for task in tasks])
        clipped = np.clip(values.astype(np.float64), 1e-7, 1 - 1e-7)
        plain = np.where(binary, np.log(clipped) - np.log1p(-clipped), values)
        moved = self.scale * plain + self.slope * _added(self.learned, places, facts) + self.offset
        moved = np.where(binary, 1 / (1 + np.exp(-moved)), moved)
        return np.where((places > 0)[:, None], moved, values).astype(np.float32)


def fit_positions(
    tasks: tuple[Task, ...],
    learned: Array,
    served: tuple[Array, Array],
    logits: Array,
    places: Array,
    facts: Array,
    labels: Array,
) -> Positions:
    """Fits the map of a served value to one at a place: `served` are scale and bias [T] of the calibration of
    logits [E, T] that know no places; labels [E, T], places [E] and facts [E, J] of held-out exposures."""
    known = places > 0
    if not known.any():
        return Positions(learned, np.ones_like(served[0]), served[0].copy(), np.zeros_like(served[0]))
    placed = logits[known] + _added(learned, places[known], facts[known])
    slope, bias = calibrate.fit(tasks, placed, labels[known])
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

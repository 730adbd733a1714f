"""Holds what lists are worth in each way, row by row, and says what the chain gains (worth.py).

Axes: Q rows (held-out users, moments or exposures), T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.bootstrap import groups, paired_difference, ratio, spreads, user_sums
from ensemble.schema import Task

PLACES = 10  # of a list


@dataclass(frozen=True)
class Worth:
    """Holds what each way's choice was worth in each row; `values` are [Q, 1 + T]: worth, then each task."""

    kind: str  # truth | propensities | places | replay
    measure: str  # what was measured: two releases' rows are compared only where it is the same
    users: Array  # [Q] int64, user rows
    items: Array  # [Q] int64, the held-out next item; 0 where a row is a moment of the log
    times: Array  # [Q] int64
    values: dict[str, Array]  # by way
    estimates: dict[str, Any] = field(default_factory=dict)  # other estimates of the chain's worth

    def report(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Gives its part of a release's report."""
        chain = self.values["chain"][:, 0]
        names = ("worth", *(task.name for task in tasks))
        return {
            "kind": self.kind,
            "measure": self.measure,
            "rows": len(self.users),
            "users": len(np.unique(self.users)),
            "places": PLACES if self.kind == "truth" else 1,
            "weights": {task.name: task.weight for task in tasks},
            "ways": {
                way: dict(zip(names, map(float, of.mean(axis=0)), strict=True))
                for way, of in self.values.items()
            },
            "chain_minus": {
                way: vars(paired_difference(of[:, 0], chain, self.users))
                for way, of in self.values.items()
                if way != "chain"
            },
            "chain_times": {
                way: _times(of[:, 0], chain, self.users) for way, of in self.values.items() if way != "chain"
            },
            **({"estimates": self.estimates} if self.estimates else {}),
        }


def _times(first: Array, second: Array, users: Array) -> dict[str, float | None]:
    """Says how many times as much the second is worth, with a 95% interval: both [Q], paired over users.

    None where the first is worth nothing.
    """
    num_users, group = groups(users)
    above, below = (user_sums(group, of, num_users) for of in (second, first))
    [found] = spreads([ratio(above, below)], num_users)
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    return {name: value if np.isfinite(value) else None for name, value in numbers.items()}


def blended(tasks: Sequence[Task], values: Array) -> Array:
    """Puts tasks' values [..., T] together: worth, then each task over the entire space, [..., 1 + T].

    A conditional task's value counts only as often as what it is given happens.
    """
    whole = np.array(values, np.float64)
    place = {task.name: at for at, task in enumerate(tasks)}
    for at, task in enumerate(tasks):  # what is given comes before
        if task.given:
            whole[..., at] *= whole[..., place[task.given]]
    weights = np.array([task.weight for task in tasks])
    return np.concatenate([(whole @ weights)[..., None], whole], axis=-1)


def sampled(count: int, most: int) -> Array:
    """Draws at most `most` of `count` places, the same each time, in their order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def weights_text(tasks: Sequence[Task]) -> str:
    """Writes what a worth is made of: "1 ctr + 1 cvr + 0.1 dwell"."""
    return " + ".join(f"{task.weight:g} {task.name}" for task in tasks)

"""Compares two releases step by step, by turns in one process, beside Amdahl's bound."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.local import LocalPipeline
from ensemble.options import default_options
from ensemble.steps.served import open_served

_WARM_UP = 5  # turns that are not counted
_USERS = 400  # users a batch size and release


@dataclass(frozen=True)
class ChainRow:
    """Holds the CPU milliseconds a user of each step at one batch size, one thread."""

    batch: int
    before_ms: dict[str, float]
    after_ms: dict[str, float]
    engines: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Says how many times as fast the whole chain became."""
        return sum(self.before_ms.values()) / sum(self.after_ms.values())

    @property
    def bound(self) -> float:
        """Gives Amdahl's bound: the gain if only the engines' time changed."""
        others = sum(ms for name, ms in self.before_ms.items() if name not in self.engines)
        return sum(self.before_ms.values()) / (others + sum(self.after_ms[name] for name in self.engines))


def compare_chain(
    repository: Path,
    before: str,
    after: str,
    *,
    batches: tuple[int, ...] = (1, 8, 32),
    seed: int = 0,
    progress: Progress,
) -> list[ChainRow]:
    """Runs the local twins of two releases on the same users by turns, so that what the machine does besides
    falls on both."""
    twins = [LocalPipeline(open_served(repository, name)) for name in (before, after)]
    engines = tuple(model.name for model in twins[0].spec.models if model.is_engine)
    users, rng, rows = twins[0].release.user_ids.sorted_ids, np.random.default_rng(seed), []
    for place, batch in enumerate(batches):
        progress(place / len(batches), f"batches of {batch}")
        spent: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
        for turn in range(_WARM_UP + max(8, _USERS // batch)):
            drawn = rng.choice(users, batch)[:, None]
            for which in (0, 1) if turn % 2 else (1, 0):
                for name, seconds in _timed(twins[which], drawn).items():
                    spent[which][name].append(seconds)
        ms = [
            {name: float(np.mean(times[_WARM_UP:])) / batch * 1e3 for name, times in of.items()}
            for of in spent
        ]
        rows.append(ChainRow(batch, ms[0], ms[1], engines))
    return rows


def _timed(twin: LocalPipeline, user_id: Array) -> dict[str, float]:
    """Gives the CPU seconds of each step on one batch of users [B, 1]."""
    known, options, spent = {"user_id": user_id}, default_options(len(user_id)), {}
    for model in twin.spec.models:
        inputs = {tensor.name: known[tensor.name] for tensor in model.inputs}
        start = time.thread_time()
        known |= twin.steps[model.name].run(options, **inputs)
        spent[model.name] = time.thread_time() - start
    return spent


def chain_table(rows: list[ChainRow], before: str, after: str) -> Table:
    """Makes the table of CPU milliseconds a user, before -> after, and the chain's gain beside its bound."""
    table = Table(
        title=f"CPU ms a user, {before} -> {after}, one thread, steps in one process", title_justify="left"
    )
    for name in ("batch", *rows[0].before_ms, "chain", "gain", "Amdahl's bound"):
        table.add_column(name, justify="right")
    for row in rows:
        steps = [f"{ms:.2f} -> {row.after_ms[name]:.2f}" for name, ms in row.before_ms.items()]
        whole = f"{sum(row.before_ms.values()):.2f} -> {sum(row.after_ms.values()):.2f}"
        table.add_row(
            str(row.batch), *steps, whole, f"{row.gain:.2f}", f"{row.bound:.2f} ({row.gain / row.bound:.0%})"
        )
    return table

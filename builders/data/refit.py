"""Makes of a verified model's dataset the one for its refit: all that is known may be trained on.

A refit goes on from the verified weights with all the data, the rows too that chose the number of epochs
(Goodfellow et al. 2016, section 7.8: early stopping, then all the data). It replays the end of the schedule:
learning-rate rewinding (Renda et al., ICLR 2020). How much of it, and on which rows, was measured on rows
that come later still (BENCHMARKS.md).
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, Impressions, save_arrays
from builders.folders import link

CHANGED = ("train_ends", "train_impressions")  # parts of the dataset; all others are the verified one's


def refit_epochs(chosen: int, share: float) -> int:
    """Gives the epochs that a refit replays: a share of the `chosen` ones, one at least."""
    return max(1, round(share * chosen))


def holds_out(dataset: Dataset) -> bool:
    """Says whether anything that is known was held out of training."""
    held = dataset.refit_impressions[1:]
    return bool((dataset.known_ends > dataset.train_ends).any()) or any(len(part.times) for part in held)


def refit_dataset(dataset: Dataset) -> Dataset:
    """Gives the dataset whose training part is all that is known; a published test stays out.

    Validation and test targets stay as they were: by now they are no fair judges, but sane ones.
    """
    parts = dataset.refit_impressions
    joined = None if not parts else _joined(parts)
    return replace(dataset, train_ends=np.asarray(dataset.known_ends), train_impressions=joined)


def save_refit(dataset: Dataset, verified: Path, folder: Path) -> None:
    """Writes refit_dataset(dataset) into `folder`: what has not changed is linked from the folder
    `verified`."""
    for path in (path for path in verified.rglob("*") if path.is_file()):
        if path.name.partition(".")[0] not in CHANGED:
            link(path, folder / path.relative_to(verified))
    save_arrays(refit_dataset(dataset), folder, CHANGED)


def _joined(parts: tuple[Impressions, ...]) -> Impressions:
    """Puts impressions one behind the other, those that training knew first, with the labels known by now."""
    arrays = {
        entry.name: np.concatenate([getattr(part, entry.name) for part in parts])
        for entry in fields(Impressions)
        if getattr(parts[0], entry.name) is not None
    }
    settled = arrays.pop("settled", None)
    return Impressions(**arrays if settled is None else {**arrays, "labels": settled})

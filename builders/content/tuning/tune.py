"""Tunes encoders on material, and on a shop: reads, trains, measures, writes.

Axes: n items, V an encoder's own components.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.content.tuning.folders import NAMES, write_towers
from builders.content.tuning.material import Material
from builders.content.tuning.shop import material_of
from builders.content.tuning.towers import Tower
from builders.content.tuning.training import Limits, Told, Training, frozen_figures
from builders.folders import new_folder
from builders.progress import Progress, part_of
from builders.search.shared_space import WIDTH
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

FEWEST, _MOST = 64, 20_000  # items: fewer teach nothing, more are not seen often enough in an hour
_MOST_HELD = 1000  # held-out items that judge; more take long
_ENCODING = 0.25  # of the time goes at most to encoding all items as they are


@dataclass(frozen=True)
class TuneOptions:
    """Says what is tuned, how long, and where the folders go."""

    shop: Path
    out: Path
    minutes: float
    seed: int = 0
    steps: int = 0  # at most so many; 0: what the minutes allow


def tune_shop(options: TuneOptions, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Tunes a shop's encoders, writes OUT/text and OUT/image whole or not at all, and reports."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(new_folder(options.out))
        except OSError as error:
            raise InvalidInput(
                f"{options.out} cannot be written: {error.strerror or error}", "give another --out"
            ) from None
        progress(0.0, "reading the shop")
        material = material_of(options.shop)
        limits = Limits(60 * options.minutes, options.steps, began=began)
        towers, report = tune_material(material, options.seed, limits, say, progress)
        write_towers(towers, folder)
    for tower, view in zip(towers, material.views, strict=True):
        report["features"][view.feature] = str(options.out.resolve() / NAMES[tower.is_text])
    return report


def tune_material(
    material: Material,
    seed: int,
    limits: Limits,
    say: Callable[[str], None],
    progress: Progress = lambda share, text: None,
) -> tuple[list[Tower], dict[str, Any]]:
    """Tunes the encoders of a material's views: the towers as they are best, and what was gained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = [Tower(view.source, WIDTH) for view in material.views]
        material = _sample(material, seed)
        material, frozen = _encoded(towers, material, limits, part_of(progress, 0.0, 0.1))
        training = Training(towers, material, seed, say)
        _refuse_few(training)
        training.fit_heads(frozen, part_of(progress, 0.1, 0.15))
        judges = training.judges
        before = training.places(judges)
        figures: dict[str, Any] = {}
        if len(towers) == 2:
            figures["frozen"] = frozen_figures(frozen, training.learns, judges)
        else:
            figures["frozen"] = training.figures([of[judges] for of in frozen], judges)
        figures["heads alone"] = training.figures(before, judges)
        told = training.run(limits, part_of(progress, 0.15, 1.0))
        figures["tuned"] = training.figures(training.places(judges), judges)
    return towers, _report(training, told, figures)


def _sample(material: Material, seed: int) -> Material:
    """Draws the items in random order, so that any beginning of them is a fair one; at most _MOST, and at
    most _MOST_HELD held-out ones."""
    order = np.random.default_rng(seed).permutation(len(material))
    held = material.held[order]
    spare = held & (np.cumsum(held) > _MOST_HELD)
    return material.at(order[~spare][:_MOST])


def _encoded(
    towers: list[Tower], material: Material, limits: Limits, progress: Progress
) -> tuple[Material, list[Array]]:
    """Encodes all items as they are, or the first of them that the time allows: vectors [n, V of each]; items
    that cannot be read are left out."""
    found: list[Array] = []
    for at, (tower, view) in enumerate(zip(towers, material.views, strict=True)):
        until = _ENCODING * (at + 1) / len(towers)

        def told(done: int, at: int = at, until: float = until) -> bool:
            progress((at + done / len(material)) / len(towers), f"encoding {done:,} of {len(material):,}")
            return limits.spent() < until or done < 4 * FEWEST

        found.append(tower.encoded(view.read, len(material), placed=False, told=told))
    count = min(map(len, found))
    good = np.flatnonzero(np.all([of[:count].any(axis=1) for of in found], axis=0))
    return material.at(good), [of[good] for of in found]


def _refuse_few(training: Training) -> None:
    material = training.material
    names = " and ".join(f"{view.feature!r}" for view in material.views)
    if len(training.towers) == 1:
        if len(training.drawn()) < FEWEST:
            raise InvalidInput(
                f"{len(training.drawn()):,} items with {names} were clicked together with others, and "
                f"{FEWEST} are needed",
                "name an encoder for both a text and an image feature: then each item's own two are a pair",
            )
    elif len(training.learns) < FEWEST or len(training.judges) < 2:
        raise InvalidInput(
            f"{len(material):,} items have both {names}, and {FEWEST + 8} are needed", "tune a larger shop"
        )


def _report(training: Training, told: Told, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "features": {},
        "items": len(training.learns),
        "held_out": len(training.judges),
        "clicked_together": len(training.material.together),
        "figures": figures,
        "gained": told.best_at > 0,
        "steps": told.steps,
        "best_step": told.best_at,
        "rounds": told.rounds,
        "groups": told.groups,
        "seconds": told.seconds,
        "seconds_a_step": round(told.seconds_a_step, 3),
        "temperature": told.temperature,
        "losses": [[step, round(loss, 4)] for step, loss in told.losses],
    }

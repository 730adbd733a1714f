"""Measures what fine-tuning on a catalogue gains its encoders of titles and pictures.

    python -m builders.bench.tuned_encoders DATA_DIR --out DIR [--minutes 25] [--seed 0]

MiniLM and EfficientNet-Lite0 are tuned, as `peregrine encoders tune` does, on the products of
DATA_DIR/mm_fashion_small that train in builders/bench/titles_and_pictures.py (four fifths, a tenth of these
held out to choose the state), whole titles beside pictures, `master_category` being the group of products
that are hard to tell apart; minutes are of CPU, on one thread. Then, of frozen and of tuned encoders as they
are served (exported, through onnxruntime): the type of a product that tests from its picture, and from its
title without the words of any type, by the same logistic regression on vectors and on the components that a
row holds; and how often such a title finds its picture among the first ten of those that test, and a picture
its title, by frozen components, by linear heads over frozen vectors, and by the tuned space.

DIR keeps the folders DIR/tuned/text and DIR/tuned/image, the encoders and their vectors.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.bench.shared_space import trained, vectors_of
from builders.bench.titles_and_pictures import (
    STRENGTHS,
    accuracy,
    masked,
    pictures_of,
    products_of,
    row_of,
    scaled,
)
from builders.content.sources import EFFICIENTNET, MINILM, find_source
from builders.content.tuning.figures import pair_figures
from builders.content.tuning.folders import write_towers
from builders.content.tuning.material import Material, View, is_held_out, numbered
from builders.content.tuning.training import Limits
from builders.content.tuning.tune import tune_material
from builders.folders import new_folder
from builders.shop.shop_toml import FeatureColumn
from ensemble.arrays import Array
from ensemble.errors import PeregrineError
from ensemble.json_text import json_text

_FEWEST = 20


class Products:
    """Holds the products, and which of them train."""

    def __init__(self, source: Path) -> None:
        rows = products_of(source)
        self.ids = [row["product_id"].encode() for row in rows]
        self.titles, self.pictures = [row["title"] for row in rows], pictures_of(source, rows)
        self.types = np.array([row["article_type"] for row in rows])
        self.categories = [row["master_category"] for row in rows]
        self.masked = masked(self.titles, sorted(set(self.types.tolist())))
        names, counts = np.unique(self.types, return_counts=True)
        self.known = np.isin(self.types, names[counts >= _FEWEST])
        self.trains = np.zeros(len(rows), bool)
        self.trains[np.random.RandomState(0).permutation(len(rows))[: int(0.8 * len(rows))]] = True

    def material(self) -> Material:
        """Gives what is tuned on: none of the products that test."""
        rows = np.flatnonzero(self.trains)
        views = (
            self._view("text", MINILM, [self.titles[at] for at in rows]),
            self._view("image", EFFICIENTNET, [self.pictures[at] for at in rows]),
        )
        groups = numbered([self.categories[at] for at in rows])
        held = is_held_out([self.ids[at] for at in rows])
        return Material(views, held, groups, np.zeros((0, 2), np.int64))

    def _view(self, kind: str, name: str, inputs: Sequence[Any]) -> View:
        source = find_source(FeatureColumn(name=kind, kind=kind, encoder=name), Path())
        return View(kind, source, numbered(inputs), lambda of: [inputs[at] for at in of])


def tune(products: Products, out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Tunes both encoders into DIR/tuned; gives what the training says of itself."""
    torch.set_num_threads(1)
    limits = Limits(60 * minutes, clock=time.process_time, began=time.process_time())
    said: list[float] = [0.0]

    def progress(share: float, text: str) -> None:
        if share - said[0] >= 0.01:
            said[0] = share
            print(f"{share:.0%} {text}", file=sys.stderr, flush=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with new_folder(out / "tuned") as folder:
        towers, report = tune_material(products.material(), seed, limits, say, progress)
        write_towers(towers, folder)
    return report


def figures(products: Products, out: Path) -> dict[str, Any]:
    """Measures frozen and tuned encoders on the products that test."""
    titles = [title.encode() for title in products.masked]
    tuned = {kind: str((out / "tuned" / kind).resolve()) for kind in ("text", "image")}
    names = {"frozen": {"text": MINILM, "image": EFFICIENTNET}, "tuned": tuned}
    found = {
        way: {
            "text": vectors_of("text", of["text"], titles, out),
            "image": vectors_of("image", of["image"], products.pictures, out),
        }
        for way, of in names.items()
    }
    told: dict[str, Any] = {way: _types(products, of) for way, of in found.items()}
    learns, tests = (
        np.flatnonzero(chosen & np.all([v.any(axis=1) for v in found["frozen"].values()], axis=0))
        for chosen in (products.trains, ~products.trains)
    )
    told["products that test"] = len(tests)
    told["masked titles and pictures"] = _pairs(found, learns, tests)
    return told


def _types(products: Products, of: dict[str, Array]) -> dict[str, float]:
    """Gives how often a type is told, by vectors and by what a row holds of them."""
    trains, tests = products.known & products.trains, products.known & ~products.trains
    told = {}
    for name, kind, strength in (("picture", "image", "picture"), ("masked title", "text", "title")):
        whole = scaled(of[kind], products.trains)
        told[name] = accuracy(whole, products.types, trains, tests, STRENGTHS[strength])
        rows = row_of(of[kind])
        told[f"{name}, components of a row"] = accuracy(rows, products.types, trains, tests, STRENGTHS["row"])
    return told


def _pairs(found: dict[str, dict[str, Array]], learns: Array, tests: Array) -> dict[str, Any]:
    """Gives how masked titles and pictures that test find each other, by three spaces."""
    frozen = [found["frozen"][kind] for kind in ("text", "image")]
    both = [(of - of[learns].mean(axis=0)) / (of[learns].std(axis=0) + 1e-6) for of in frozen]
    heads = trained(both[0][learns], both[1][learns], 0, 30, 0)
    with torch.no_grad():
        placed = [of.numpy() for of in heads(*(torch.from_numpy(of[tests]) for of in both))]
    tuned = [found["tuned"][kind][tests] for kind in ("text", "image")]
    return {
        "frozen": pair_figures(*(row_of(of)[tests] for of in frozen)),
        "linear heads": pair_figures(*placed),
        "tuned": pair_figures(*tuned),
    }


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="builders.bench.tuned_encoders", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    products, told = Products(asked.data), dict[str, Any]()
    if not (asked.out / "tuned").exists():
        told["training"] = tune(products, asked.out, asked.minutes, asked.seed)
        print(json_text(told, indent=1), flush=True)
    print(json_text(figures(products, asked.out), indent=1))


if __name__ == "__main__":
    try:
        main()
    except PeregrineError as error:
        sys.exit(f"error: {error}")

"""Measures what a shared space of titles and pictures finds, with both encoders frozen: a table.

    python -m builders.bench.shared_space DATA_DIR --out DIR [--epochs 30] [--hidden 512]

A linear head a kind (or one with a hidden layer) over the frozen vectors of DATA_DIR/mm_fashion_small is
trained to put a product's picture beside its own title and away from those of the batch: the symmetric
contrastive loss of CLIP (Radford et al., ICML 2021) with a learned temperature. A fifth of the products, by a
hash of their number, is held out; titles have lost every word of a type's name. Told of these: the mean
cosine of true pairs and of all others, and how often a title finds its picture among the first ten (R@10),
and a picture its title. `frozen` is what there is without heads: the components that an item's row holds.
DIR keeps the encoders and their vectors.

Axes: n products, V a frozen vector's components, D those of the space.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.bench.titles_and_pictures import kept_encoder, kept_vectors, masked, pictures_of, products_of
from builders.content.sources import EFFICIENTNET, MINILM
from builders.content.tuning.figures import pair_figures
from builders.search.shared_space import WIDTH, Heads, train
from ensemble.arrays import Array
from ensemble.content.projection import fitted_projection
from ensemble.errors import PeregrineError
from ensemble.json_text import json_text

_RATE, _DECAY, _DROPOUT = 2e-3, 0.01, 0.3  # of whole vectors, which have more components than rows


def _head(width: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(width, WIDTH))
    inside = (nn.Linear(width, hidden), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, WIDTH))
    return nn.Sequential(nn.Dropout(_DROPOUT), *inside)


def trained(first: Array, second: Array, hidden: int, epochs: int, seed: int) -> Heads:
    """Trains heads on pairs of standardized vectors [n, V]."""
    torch.manual_seed(seed)
    heads = Heads([_head(of.shape[1], hidden) for of in (first, second)])
    return train(heads, (first, second), seed, rate=_RATE, decay=_DECAY, epochs=epochs)


def figures(source: Path, out: Path, hidden: int, epochs: int, seed: int) -> dict[str, Any]:
    """Measures all ways: {way: figures}, and how many products they are of."""
    rows = products_of(source)
    titles = masked([row["title"] for row in rows], sorted({row["article_type"] for row in rows}))
    words = vectors_of("text", MINILM, [title.encode() for title in titles], out)
    looks = vectors_of("image", EFFICIENTNET, pictures_of(source, rows), out)
    there = words.any(axis=1) & looks.any(axis=1)
    held = np.array([zlib.crc32(row["product_id"].encode()) % 5 == 0 for row in rows])
    learns, tests = np.flatnonzero(there & ~held), np.flatnonzero(there & held)
    frozen = [_components(of[learns], of[tests]) for of in (words, looks)]
    told: dict[str, Any] = {"products held out": len(tests), "frozen": pair_figures(frozen[0], frozen[1])}
    scaled = [(of - of[learns].mean(axis=0)) / (of[learns].std(axis=0) + 1e-6) for of in (words, looks)]
    for name, width in (("linear heads", 0), (f"heads of {hidden}", hidden)):
        heads = trained(scaled[0][learns], scaled[1][learns], width, epochs, seed)
        with torch.no_grad():
            found = heads(*(torch.from_numpy(of[tests]) for of in scaled))
        told[name] = pair_figures(*(of.numpy() for of in found))
        told[name]["temperature"] = round(float(torch.exp(-heads.log_scale)), 3)
    return told


def vectors_of(kind: str, name: str, inputs: list[bytes], out: Path) -> Array:
    """Encodes inputs [n], each distinct one once for all runs: [n, V] float32, 0 where there is none."""
    distinct, vectors = kept_vectors(kept_encoder(kind, name, out / "encoded"), inputs)
    place = {one: at for at, one in enumerate(distinct)}
    whole = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
    return whole[[place.get(one, -1) for one in inputs]]


def _components(learned: Array, asked: Array) -> Array:
    """Gives the components of vectors [n, V] that an item's row holds, by those that were learned from."""
    return fitted_projection(learned, WIDTH).values(asked, np.ones(len(asked), bool))[:, :-1]


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="builders.bench.shared_space", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    told = figures(asked.data, asked.out, asked.hidden, asked.epochs, asked.seed)
    print(json_text(told, indent=1))


if __name__ == "__main__":
    try:
        main()
    except PeregrineError as error:
        sys.exit(f"error: {error}")

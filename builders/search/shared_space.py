"""Trains the heads of the space that a shop's titles and pictures share, over what rows hold of both.

Each head is a linear map, trained to put an item's picture beside its own title and away from those of its
batch: the symmetric contrastive loss of CLIP (Radford et al., ICML 2021) with a learned temperature, both
encoders frozen. A fifth of the items, by a hash of their ids, teaches nothing: on these is judged what the
space finds (builders/search/shown.py).

Encoders whose own vectors share a space (both towers of a CLIP folder, or encoders that were tuned together)
need no training: their heads turn rows back into what these vectors were. Trained ones take their place only
where they find more of a tenth of the pairs.

Axes: n pairs, P components of a feature in a row, D those of the space.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from builders.data.dataset import Dataset
from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.content.encoder import read_facts
from ensemble.content.projection import PROJECTIONS, Projection, read_projections
from ensemble.content.shared_space import Head
from ensemble.contract import IMAGE, TEXT
from ensemble.index.looks import unit_rows
from ensemble.schema import Feature, Schema

WIDTH = 128
_FEWEST, _MOST = 64, 20_000  # pairs: too few teach nothing, more take long
_EPOCHS, _STEPS, _BATCH = 30, 300, 512  # few pairs are seen as often as fills the steps
_RATE, _DROPOUT = 5e-3, 0.2
_PRIOR, _MOST_DECAY = 1600, 2.0  # weights decay by so many over the pairs: the fewer, the plainer the map
_TEMPERATURE, _SHARPEST = 0.07, 100.0
_ASKED = 10  # one pair in so many says whether exact heads or trained ones find more
_JUDGED = 5  # one item in so many teaches nothing


class Heads(nn.Module):
    """Maps vectors of two kinds [n, P of each] into one space, [n, D] of length 1, by a module a kind."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / _TEMPERATURE), dtype=torch.float32))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives both kinds' places in the space."""
        one, other = (
            functional.normalize(head(x)) for head, x in zip(self.heads, (first, second), strict=True)
        )
        return one, other

    def loss(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Gives the contrastive loss of true pairs among each other."""
        one, other = self(first, second)
        logits = one @ other.T * self.log_scale.exp().clamp(max=_SHARPEST)
        own = torch.arange(len(first))
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def train(
    heads: Heads,
    pairs: tuple[Array, Array],
    seed: int,
    *,
    rate: float = _RATE,
    decay: float | None = None,
    epochs: int | None = None,
    progress: Progress = lambda share, text: None,
) -> Heads:
    """Trains heads on pairs of standardized vectors [n, P of each] float32, in place."""
    steps = max(1, len(pairs[0]) // _BATCH)
    epochs = epochs or max(_EPOCHS, _STEPS // steps)
    decay = min(_MOST_DECAY, _PRIOR / len(pairs[0])) if decay is None else decay
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    one, other = map(torch.from_numpy, pairs)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        progress(epoch / epochs, f"titles beside pictures: {epoch} of {epochs} rounds")
        for chosen in np.array_split(rng.permutation(len(one)), steps):
            optimizer.zero_grad()
            heads.loss(one[chosen], other[chosen]).backward()
            optimizer.step()
            schedule.step()
    return heads.eval()


def shared_features(schema: Schema) -> tuple[Feature, Feature] | None:
    """Gives the features that share the space, the first text and the first picture that is encoded; None
    where a shop lacks either."""
    first = [next((f for f in schema.items.features if f.encoder == model), None) for model in (TEXT, IMAGE)]
    return None if first[0] is None or first[1] is None else (first[0], first[1])


def is_judged(item_ids: Array) -> Array:
    """Says which items [I] S teach the space nothing, and judge it: [I] bool."""
    return np.array([zlib.crc32(one) % _JUDGED == 0 for one in item_ids.tolist()], bool)


def exact_heads(schema: Schema, folder: Path) -> dict[str, Head] | None:
    """Computes the heads, by feature, of encoders whose vectors share a space, of a data stage's or a staged
    release's `folder`; None where they share none."""
    features = shared_features(schema)
    if features is None:
        return None
    spaces = {read_facts(folder / f"{feature.encoder}.json").space for feature in features}
    if len(spaces) > 1 or not spaces.pop():
        return None
    projections = read_projections(folder / PROJECTIONS)
    return {feature.name: _undone(projections[feature.name]) for feature in features}


def _undone(projection: Projection) -> Head:
    """Turns a row of length 1 back into the direction of the vector [V] that was projected: its mean stands
    for what the row's length was, as a vector of length 1 is as far from the mean as most are."""
    scale = 1 / np.linalg.norm(projection.components, axis=1).mean()
    away = np.sqrt(max(1e-6, 1 - float(projection.mean @ projection.mean)))
    return Head(
        np.ascontiguousarray(projection.components * scale, np.float32),
        np.asarray(projection.mean / away, np.float32),
    )


def fit_heads(
    dataset: Dataset, seed: int, progress: Progress, exact: dict[str, Head] | None = None
) -> dict[str, Head] | None:
    """Trains the heads of a shop's items, by feature; None where too few have both a title and a picture.

    `exact` ones, where there are any, stay unless trained ones find more. The same data and seed give the
    same heads.
    """
    features = shared_features(dataset.schema)
    if features is None:
        return None
    values = dataset.item_values
    # the last column of a feature is 1 where there is nothing
    there = np.all([np.asarray(values[1:, f.columns.stop - 1]) == 0 for f in features], axis=0)
    rows = 1 + np.flatnonzero(there & ~is_judged(dataset.item_ids))
    if len(rows) < _FEWEST:
        return exact
    if len(rows) > _MOST:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _MOST, replace=False))
    pairs = [unit_rows(np.asarray(values[rows][:, f.columns])) for f in features]
    names = [f.name for f in features]
    if exact is not None and _is_better([exact[name] for name in names], pairs, seed, progress):
        return exact
    return dict(zip(names, fitted_heads(pairs, seed, progress), strict=True))


def _is_better(exact: list[Head], pairs: list[Array], seed: int, progress: Progress) -> bool:
    """Says whether exact heads find as many of a tenth of the pairs as heads trained on the others do."""
    asked = np.arange(len(pairs[0])) % _ASKED == 0
    trained = fitted_heads([of[~asked] for of in pairs], seed, progress)
    of = [of[asked] for of in pairs]
    return _finds(exact, of) >= _finds(trained, of)


def _finds(heads: list[Head], pairs: list[Array]) -> float:
    """Gives the mean reciprocal rank of true pairs [n, P of each], both ways."""
    one, other = (head.unit(of) for head, of in zip(heads, pairs, strict=True))
    scores = one @ other.T
    own = np.diag(scores)
    ranks = [1 + (scores > own[:, None]).sum(axis=1), 1 + (scores > own[None]).sum(axis=0)]
    return float(np.mean([1 / of for of in ranks]))


def fitted_heads(pairs: list[Array], seed: int, progress: Progress) -> list[Head]:
    """Trains a head a kind on true pairs of rows [n, P of each] float32 of length 1; the same each time."""
    means = [of.mean(axis=0) for of in pairs]
    spreads = [of.std(axis=0) + np.float32(1e-6) for of in pairs]
    scaled = [(of - mean) / spread for of, mean, spread in zip(pairs, means, spreads, strict=True)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = [nn.Linear(of.shape[1], WIDTH) for of in pairs]
        heads = Heads([nn.Sequential(nn.Dropout(_DROPOUT), one) for one in maps])
        train(heads, (scaled[0], scaled[1]), seed, progress=progress)
    found = []
    for one, mean, spread in zip(maps, means, spreads, strict=True):
        weight, bias = one.weight.detach().numpy() / spread, one.bias.detach().numpy()
        found.append(Head(np.ascontiguousarray(weight.T), bias - weight @ mean))
    return found

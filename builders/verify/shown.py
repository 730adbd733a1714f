"""Says what lists show, whatever they hit: how much of the catalogue, how well known, how unlike each other.

Two releases may hit equally often, the one with a hundred items and the other with ten thousand.

Axes: Q held-out users, K places of a list, I items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, Targets, training_histories
from builders.export.verifier import BATCH, Verifier
from builders.verify.by_truth import unseen
from builders.verify.values import PLACES
from ensemble.arrays import Array
from ensemble.bootstrap import ratio, spreads, user_rows, user_sums

_LISTS = 2000  # held-out users whose lists are looked at, at most


@dataclass(frozen=True)
class Lists:
    """Holds what some users would be shown, each once."""

    users: Array  # [Q] int64
    ways: dict[str, Array]  # [Q, K] int64 item rows, best first, padded with -1


def asked_lists(verifier: Verifier, targets: Targets) -> Lists:
    """Asks the release about (a sample of) the targets' users; popularity's lists stand beside its own."""
    _, first = np.unique(targets.user_rows, return_index=True)
    chosen = np.sort(np.random.default_rng(0).permutation(first)[:_LISTS])
    popular = np.argsort(-verifier.popularity[1:], kind="stable") + 1
    parts: dict[str, list[Array]] = {way: [] for way in ("chain", "recall", "popularity")}
    for start in range(0, len(chosen), BATCH):
        piece = chosen[start : start + BATCH]
        answer = verifier.answer(targets.user_rows[piece], targets.history_ends[piece])
        parts["chain"].append(_first_places(answer.shown))
        parts["recall"].append(_first_places(answer.recalled))
        parts["popularity"].append(_first_places(unseen(popular[: PLACES + answer.had.shape[1]], answer.had)))
    empty = [np.zeros((0, PLACES), np.int64)]
    ways = {way: np.concatenate(empty + of) for way, of in parts.items()}
    return Lists(targets.user_rows[chosen], ways)


def _first_places(rows: Array) -> Array:
    """Gives the first K of lists [Q, *], padded with -1: [Q, K] int64."""
    out = np.full((len(rows), PLACES), -1, np.int64)
    out[:, : rows.shape[1]] = np.where(rows[:, :PLACES] > 0, rows[:, :PLACES], -1)
    return out


def variety(dataset: Dataset, embeddings: Array, lists: Lists) -> dict[str, Any]:
    """Measures each way's lists: embeddings [I + 1, D] say how alike two items are.

    - `items`: different items shown; `coverage`: their share of the catalogue. Both grow with `lists`.
    - `half`: how few items have half of all places.
    - `novelty`: mean of -log2 of the share of training users who took an item, in bits (mean
      self-information, Vargas and Castells, RecSys 2011); one that a user in a thousand took has 10.
    - `diversity`: mean of 1 - cosine over the pairs of a list (intra-list distance, Ziegler et al., WWW
      2005).
    """
    bits, units = _self_information(dataset), _units(embeddings)
    found = {}
    for way, rows in lists.ways.items():
        places = np.sort(np.bincount(rows[rows > 0], minlength=dataset.num_items + 1))[::-1]
        shown = int((places > 0).sum())
        half = np.searchsorted(np.cumsum(places), places.sum() / 2) + 1 if shown else 0
        is_item = rows > 0
        found[way] = {
            "items": shown,
            "coverage": shown / max(1, dataset.num_items),
            "half": int(half),
            "novelty": _mean(np.where(is_item, bits[np.maximum(rows, 0)], 0).sum(1), is_item.sum(1)),
            "diversity": _mean(*_distances(units, rows)),
        }
    return {"lists": len(lists.users), "places": PLACES, "ways": found}


def _self_information(dataset: Dataset) -> Array:
    """Gives -log2 of the share of training users who took each item: [I + 1]; one more took each."""
    offsets, items = training_histories(dataset)
    lengths = np.diff(offsets)
    pairs = np.unique(np.repeat(np.arange(len(lengths)), lengths) * (dataset.num_items + 1) + items)
    takers = np.bincount(pairs % (dataset.num_items + 1), minlength=dataset.num_items + 1)
    return -np.log2((takers + 1) / ((lengths > 0).sum() + 1))


def _units(embeddings: Array) -> Array:
    """Gives embeddings [I + 1, D] the length 1; those of length 0 keep it."""
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def _distances(units: Array, rows: Array) -> tuple[Array, Array]:
    """Adds up 1 - cosine over the pairs of each list [Q, K]: (sums [Q], numbers of pairs [Q]).

    The cosines of all pairs are the square of the sum of the vectors, less that of each with itself.
    """
    is_item = rows > 0
    vectors = units[np.maximum(rows, 0)] * is_item[..., None]
    count = is_item.sum(1)
    pairs = count * (count - 1) / 2
    cosines = (np.square(vectors.sum(1)).sum(-1) - np.square(vectors).sum((1, 2))) / 2
    return pairs - cosines, pairs


def _mean(sums: Array, counts: Array) -> dict[str, float] | None:
    """Divides all sums [Q] by all counts [Q], with a 95% interval by a bootstrap over users; None of none."""
    if not counts.sum():
        return None
    group = np.arange(len(sums))
    above, below = user_sums(group, sums, len(sums)), user_rows(group, len(sums)) * counts
    [spread] = spreads([ratio(above, below)], len(sums))
    return {"value": spread.value, "low": spread.low, "high": spread.high}


def variety_table(found: Mapping[str, Any], names: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Gives head and rows of the report's table."""
    head = ["", "items", "of all", "half of places", "novelty, bits", "diversity"]
    rows = [
        [
            names.get(way, way),
            f"{of['items']:,}",
            f"{of['coverage']:.1%}",
            f"{of['half']:,} items",
            _interval(of["novelty"], 1),
            _interval(of["diversity"], 2),
        ]
        for way, of in found["ways"].items()
    ]
    return head, rows


def variety_note(found: Mapping[str, Any]) -> str:
    """Says what the table's columns are."""
    return (
        f"What {found['lists']:,} held-out users' lists of {found['places']} show: how many different items, "
        "and which share of the catalogue that is; how few items have half of all places; novelty, the "
        "surprise of an item (10 bits: one user in a thousand took it); diversity, how unlike each other the "
        "items of a list are (0: the same, 1: unrelated). 95% intervals."
    )


def _interval(of: Mapping[str, float] | None, digits: int) -> str:
    """Writes a mean with its interval."""
    return "" if of is None else f"{of['value']:.{digits}f} [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"

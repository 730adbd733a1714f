"""Offers candidates, one small class a source; the schema has their names in order, and their quotas.

A further source is a file with its class and a line of schema.SOURCE_KINDS: `offer` gives rows best first,
`score` judges the candidates of all sources. What its class opens, builders/index/sources.py has written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ensemble.arrays import Array, look_up, sum_by_row, without_repeats
from ensemble.errors import ReleaseError
from ensemble.index.filters import RowMask
from ensemble.index.item_index import open_main, open_segment_index, search
from ensemble.index.main_index import QuerySettings
from ensemble.index.probe import BASELINE, ProbeSettings, RecallProbe, read_baseline
from ensemble.live.state import LiveView
from ensemble.schema import SOURCE_KINDS
from ensemble.steps.recall_settings import RecallSettings
from ensemble.steps.served import ServedRelease

STRIDE = 1 << 40  # more rows than any catalogue: user * STRIDE + row is a key of both


@dataclass(frozen=True)
class Batch:
    """Holds what a dynamic batch of B users asks of the sources."""

    query: Array  # [B, M, D] float32
    seen_rows: Array  # [B, W] int64, newest last, -1 where padded
    view: LiveView
    masks: Sequence[RowMask | None] = ()  # [B], which rows pass each user's filter
    # [B] int64: how many offers of a source are enough for each user, N and all that may be excluded
    depths: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    # What a source has looked up for both `offer` and `score`, by its name: rows and scores [B, *].
    lists: dict[str, tuple[Array, Array]] = field(default_factory=dict)


class Source(Protocol):
    """Offers candidates and scores those of all sources; opened once on a release."""

    name: str  # in schema.SOURCE_KINDS
    fills_up: bool  # its offers beyond the quota come after everybody else's

    def offer(self, batch: Batch) -> Array:
        """Gives distinct rows [B, *] int64 best first, -1 where there is none; any may be ineligible."""
        ...

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Scores candidates: rows [B, N] int64 with embeddings [B, N, D] -> [B, N] float32; where a row is
        padding any number will do."""
        ...


def open_sources(release: ServedRelease, settings: RecallSettings) -> list[Source]:
    """Opens every source of the schema, in order."""
    return [
        Silent(name) if name in settings.off else _kind(name)(release, settings)
        for name in release.schema.source_names
    ]


def _kind(name: str) -> Callable[[ServedRelease, RecallSettings], Source]:
    """Finds the class of a source; ReleaseError where this Peregrine has none."""
    if name not in SOURCE_KINDS:
        raise ReleaseError(
            f"recall source {name!r} is unknown to this Peregrine, which has {', '.join(SOURCE_KINDS)}",
            "serve it with the Peregrine that built it",
        )
    module, _, kind = SOURCE_KINDS[name][0].partition(":")
    found: Callable[[ServedRelease, RecallSettings], Source] = getattr(importlib.import_module(module), kind)
    return found


class Silent:
    """Stands for a source that is switched off: it offers nothing, and its score is 0."""

    fills_up = False

    def __init__(self, name: str) -> None:
        self.name = name

    def offer(self, batch: Batch) -> Array:
        """Gives no rows [B, 0]."""
        return np.zeros((len(batch.query), 0), np.int64)

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives 0 for every row [B, N]."""
        return np.zeros(rows.shape, np.float32)


class Nearest:
    """Offers the items whose embeddings have the greatest inner product with any of a user's interests."""

    name, fills_up = "user_embeddings", False

    def __init__(self, release: ServedRelease, settings: RecallSettings) -> None:
        query = QuerySettings(settings.nprobe, settings.refine_factor)
        release.live.attach(
            open_main(release, query), lambda segment: open_segment_index(release, query, segment)
        )
        baseline = read_baseline(release.path / BASELINE)
        self.probe = RecallProbe(ProbeSettings(settings.probe_share), baseline, release.name)

    def offer(self, batch: Batch) -> Array:
        """Gives rows [B, deepest * M]: each interest's best, then each one's second, and so on; what two
        interests offer stands once, or it would fill places that `popular` is then not asked to fill."""
        rows = search(batch.view, batch.query, batch.depths, batch.masks)
        self.probe.offer(batch.view, batch.query, rows, batch.masks)
        in_turns = rows.transpose(0, 2, 1).reshape(len(rows), rows.shape[1] * rows.shape[2])
        return in_turns if rows.shape[1] == 1 else without_repeats(in_turns)

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives the greatest inner product over a user's interests [B, N]."""
        return np.matmul(embeddings, batch.query.transpose(0, 2, 1)).max(axis=2)


class Transitions:
    """Offers what followed the user's last items, item to item."""

    name, fills_up = "transitions", False
    file = "transitions.npy"  # [I + 1] {rows i4[L], scores f4[L]}

    def __init__(self, release: ServedRelease, settings: RecallSettings) -> None:
        self._num_last = settings.transition_items
        self._lists = np.load(release.path / self.file, mmap_mode="r", allow_pickle=False)

    def offer(self, batch: Batch) -> Array:
        """Gives rows [B, P]."""
        return best_first(*self._by_row(batch))[0]

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives log(1 + score) of what followed [B, N]; 0 where nothing of the past leads there."""
        return np.log1p(look_up(rows, *self._by_row(batch), STRIDE))

    def followers(self, seen_rows: Array) -> tuple[Array, Array]:
        """Gives what followed the last of seen_rows [B, W]: rows [B, P] best first, distinct, padded with -1;
        scores [B, P], where the k-th newest item counts 1 / k."""
        return best_first(*self._summed(seen_rows))

    def _by_row(self, batch: Batch) -> tuple[Array, Array]:
        """Gives the batch's followers in order of rows, computed once a batch."""
        if self.name not in batch.lists:
            batch.lists[self.name] = self._summed(batch.seen_rows)
        return batch.lists[self.name]

    def _summed(self, seen_rows: Array) -> tuple[Array, Array]:
        """Gives rows and scores [B, P] as sum_by_row does."""
        last = seen_rows[:, : -self._num_last - 1 : -1]  # newest first
        # Nothing has followed a new item yet.
        lists = self._lists[np.where(last < len(self._lists), np.maximum(last, 0), 0)]
        weight = 1 / np.arange(1, last.shape[1] + 1, dtype=np.float32)
        weight = weight[None, :, None] * (last > 0)[:, :, None]
        rows = lists["rows"].astype(np.int64).reshape(len(seen_rows), -1)
        scores = (lists["scores"] * weight).reshape(len(seen_rows), -1)
        rows = np.where(scores > 0, rows, -1)
        return sum_by_row(rows, np.where(rows > 0, scores, 0))


def best_first(rows: Array, scores: Array) -> tuple[Array, Array]:
    """Sorts rows and scores [B, P] by score, the greatest first, ties by row; `rows` ascend already."""
    best = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


class Popular:
    """Offers the same list to everyone; beyond its quota it fills what the others leave."""

    name, fills_up = "popular", True

    def __init__(self, release: ServedRelease, settings: RecallSettings) -> None:
        # [I + 1] float32, log(1 + events); row 0 is what an item has that is not here yet.
        self.popularity = np.asarray(np.load(release.path / "popular.npy", mmap_mode="r", allow_pickle=False))
        rows = np.lexsort((np.arange(len(self.popularity)), -self.popularity))
        self.rows = rows[rows > 0]  # [I] int64, most popular first, ties by row

    def offer(self, batch: Batch) -> Array:
        """Gives the most popular rows that pass each user's filter [B, deepest].

        Filtered before they are cut: else a rare category would find none.
        """
        depth = int(batch.depths.max(initial=0))
        if all(mask is None for mask in batch.masks):
            rows = self.rows[:depth]
            return np.broadcast_to(rows, (len(batch.masks), len(rows)))
        out = np.full((len(batch.masks), depth), -1, np.int64)
        passing: dict[int, Array] = {}
        for user, mask in enumerate(batch.masks):
            if id(mask) not in passing:
                passing[id(mask)] = self._passing(mask, depth)
            rows = passing[id(mask)]
            out[user, : len(rows)] = rows
        return out

    def score(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives log(1 + events) of each row [B, N]; that of row 0 for new items."""
        return self.popularity[np.where(rows < len(self.popularity), np.maximum(rows, 0), 0)]

    def _passing(self, mask: RowMask | None, depth: int) -> Array:
        """Gives the first `depth` rows within `mask`, looking ever further down the list."""
        if mask is None:
            return self.rows[:depth]
        length = 4 * depth
        while True:
            rows = self.rows[:length]
            rows = rows[mask.passes(rows)]
            if len(rows) >= depth or length >= len(self.rows):
                return rows[:depth]
            length *= 8

"""Step 3, recall: which N items could this user want? Several sources, merged; only eligible items come out.

    index         Faiss inner product with each interest vector      (Flat; IVF, compressed or not, on large catalogues)
    transitions   what followed the user's last items, item to item
    popular       the same list for everyone; fills what the others leave

Each source offers its best; an item offered twice counts once; quotas keep a place for each source. All
candidates then get every source's score, and their order is the fused score (weights fitted at build time),
ties by row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Tensors, look_up, sum_by_row
from ensemble.contract import QUERY_TENSORS, SOURCES
from ensemble.errors import ReleaseError
from ensemble.index.filters import ItemFilters, RowMask
from ensemble.index.item_index import ItemIndex, open_main
from ensemble.index.main_index import QuerySettings
from ensemble.index.probe import BASELINE, ProbeSettings, RecallProbe, read_baseline
from ensemble.live.items import LiveView
from ensemble.live.rows import read_items
from ensemble.options import Options
from ensemble.spec import ModelSpec
from ensemble.steps.served import ServedRelease
from ensemble.telemetry import Metric

_STRIDE = 1 << 40  # more rows than any catalogue: user * stride + row is a key of both


@dataclass(frozen=True)
class RecallSettings:
    """What the builder chose; recall.json of a release."""

    nprobe: int = 1  # IVF lists visited; Flat ignores it
    # items scored again with vectors.npy for each one wanted; 0: the index's own scores are exact
    refine_factor: int = 0
    probe_share: float = 0.001  # of live queries, searched exactly in the background
    transition_items: int = 5  # last items of the past that transitions are read for
    transition_quota: int = 96  # places kept among the N candidates
    popular_quota: int = 16
    source_weights: tuple[float, ...] = (1.0, 1.0, 0.0)  # of SOURCES in the fused score

    def to_json(self) -> str:
        return json.dumps(self.__dict__, indent=1)


def settings_from_json(text: str) -> RecallSettings:
    """Inverse of RecallSettings.to_json; ReleaseError when another version wrote it."""
    try:
        raw = json.loads(text)
        return RecallSettings(**{**raw, "source_weights": tuple(raw["source_weights"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ReleaseError(
            f"recall.json does not fit this Peregrine ({error}); build the release again"
        ) from None


def fused(rows: np.ndarray, scores: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Candidates [B, N] and source scores [B, N, S] -> the score that sorts them [B, N], -inf where
    padded."""
    return np.where(rows > 0, scores @ np.array(weights, np.float32), -np.inf)


class Recall:
    """State: the index, item rows, transition lists and popular list of one release, all memory-mapped."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("index.faiss", "recall.json", "items.npy", "numbers.npy", "item_ids.npy")
        release.verify_data("transitions.npy", "popular.npy", "vocabularies.json")
        self.sizes = release.schema.sizes
        self.settings = settings_from_json((release.path / "recall.json").read_text())
        self.items, self.item_ids = release.items, release.item_ids
        self.live = release.live
        query = QuerySettings(self.settings.nprobe, self.settings.refine_factor)
        self.live.attach(lambda state: open_main(release, query, state))
        self.index = ItemIndex()
        self.probe = RecallProbe(
            ProbeSettings(self.settings.probe_share), read_baseline(release.path / BASELINE)
        )
        # [I + 1] {rows i4[L], scores f4[L]}
        self.transitions = np.load(release.path / "transitions.npy", mmap_mode="r", allow_pickle=False)
        # [I + 1] f4, log(1 + events); row 0 is 0
        popularity = np.load(release.path / "popular.npy", mmap_mode="r", allow_pickle=False)
        self.popularity = np.asarray(popularity)
        self.popular_rows = np.lexsort((np.arange(len(self.items)), -self.popularity))
        self.popular_rows = self.popular_rows[self.popular_rows > 0]
        self.item_reader = release.readers.items
        self.filters = ItemFilters(
            release.schema, release.vocabularies.get("items", {}), self.items["codes"], release.item_numbers
        )

    def run(self, options: Options, *, seen_rows: np.ndarray, **queries: np.ndarray) -> Tensors:
        """seen_rows [B, W] and query tensors [B, *, D] -> candidate_* [B, N…] (contract.py)."""
        query = np.concatenate([queries[name] for name in QUERY_TENSORS], axis=1)
        view = self.live.refresh()
        excluded = self._excluded(options, seen_rows, view)
        transitions = self.transition_offers(seen_rows)
        rows = self._merge(*self._offers(options, query, transitions[0], excluded, view))
        return self._scored(query, rows, transitions, view)

    def metrics(self) -> list[Metric]:
        """Lists the live items' numbers and the probe's."""
        own = {**self.live.metrics(), **self.probe.metrics()}
        return [
            Metric(f"peregrine_{name}", (), float(value), is_counter=False) for name, value in own.items()
        ]

    # --- what must not come out

    def _excluded(self, options: Options, seen_rows: np.ndarray, view: LiveView) -> np.ndarray:
        """Sorted keys (user * rows + row) [X] int64 of items a user has seen (unless wanted again) or
        excluded."""
        users, columns = np.nonzero((seen_rows > 0) & options.exclude_seen[:, None])
        keys = users * _STRIDE + seen_rows[users, columns]
        owners, ids = options.ids("exclude_items")
        if len(owners):
            keys = np.concatenate([keys, owners * _STRIDE + view.rows_from_ids(ids)])
        return np.unique(keys)

    def _eligible(
        self, rows: np.ndarray, excluded: np.ndarray, masks: list[RowMask | None], view: LiveView
    ) -> np.ndarray:
        """rows [B, X] with those replaced by -1 that are excluded, deleted or do not pass their user's
        filter."""
        keys = rows + np.arange(len(rows))[:, None] * _STRIDE
        bad = (rows <= 0) | view.is_deleted(rows) if view.num_deleted else rows <= 0
        if len(excluded):
            place = np.minimum(np.searchsorted(excluded, keys), len(excluded) - 1)
            bad |= excluded[place] == keys
        for user, mask in enumerate(masks):
            if mask is not None:
                bad[user] |= ~mask.passes(rows[user])
        return np.where(bad, -1, rows)

    # --- what each source offers

    def _offers(
        self,
        options: Options,
        query: np.ndarray,
        transition_rows: np.ndarray,
        excluded: np.ndarray,
        view: LiveView,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Eligible rows [B, X] of all sources side by side, and each one's place in line [B, X] (smaller
        comes first)."""
        num_users, interests, wanted = len(query), query.shape[1], self.sizes.candidates
        masks = [None if u.filter is None else self.filters.mask(u.filter, view) for u in options.users]
        num_excluded = np.bincount(excluded // _STRIDE, minlength=num_users)
        depth = min(wanted + int(num_excluded.max(initial=0)), view.num_rows - 1)
        found = self.index.search(view, query, depth, masks)  # [B, M, depth], best first
        self.probe.offer(view, query, found, masks)
        line_index = np.broadcast_to(np.arange(found.shape[2]) * interests, found.shape).reshape(
            num_users, -1
        )
        popular = self._popular(depth, masks)
        parts = [found.reshape(num_users, -1), transition_rows, popular]
        sources = np.repeat(np.arange(3), [p.shape[1] for p in parts])
        rows = self._eligible(np.concatenate(parts, axis=1), excluded, masks, view)
        order = np.concatenate(
            [
                line_index[0] if num_users else np.zeros(0, np.int64),
                np.arange(transition_rows.shape[1]),
                np.arange(popular.shape[1]),
            ]
        )
        return rows, self._places(rows, sources, order)

    def _places(self, rows: np.ndarray, sources: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Place in line [B, X]: eligible offers within their source's quota first, then the rest; -1 rows
        last.

        A source's offers are counted after filtering, so that a quota is filled by items that can be shown.
        """
        quotas = np.array(
            [
                self.sizes.candidates - self.settings.transition_quota - self.settings.popular_quota,
                self.settings.transition_quota,
                self.settings.popular_quota,
            ]
        )
        rank = np.empty(rows.shape, np.int64)
        for source in range(3):  # sources, not rows: the loop has three turns
            columns = np.flatnonzero(sources == source)
            by_order = columns[np.argsort(order[columns], kind="stable")]
            rank[:, by_order] = np.cumsum(rows[:, by_order] > 0, axis=1) - 1
        # popular beyond its quota only fills up
        beyond = (rank >= quotas[sources]).astype(np.int64) * (1 + (sources == 2))
        place = beyond * 10_000_000 + rank * 4 + sources
        return np.where(rows > 0, place, np.iinfo(np.int64).max)

    def _popular(self, depth: int, masks: list[RowMask | None]) -> np.ndarray:
        """The most popular rows that pass each user's filter: [B, depth], padded with -1. Filtered before
        they are cut: else a rare category would find none, and what a user gets would depend on how deep its
        batch-mates go."""
        if all(mask is None for mask in masks):
            rows = self.popular_rows[:depth]
            return np.broadcast_to(rows, (len(masks), len(rows)))
        out = np.full((len(masks), depth), -1, np.int64)
        found: dict[int, np.ndarray] = {}
        for user, mask in enumerate(masks):
            if id(mask) not in found:
                found[id(mask)] = (
                    self.popular_rows[:depth] if mask is None else self._popular_passing(mask, depth)
                )
            rows = found[id(mask)]
            out[user, : len(rows)] = rows
        return out

    def _popular_passing(self, mask: RowMask, depth: int) -> np.ndarray:
        """The first `depth` popular rows within `mask`; looks ever further down the list."""
        length = 4 * depth
        while True:
            rows = self.popular_rows[:length]
            rows = rows[mask.passes(rows)]
            if len(rows) >= depth or length >= len(self.popular_rows):
                return rows[:depth]
            length *= 8

    def transition_offers(self, seen_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What followed the last items of each user: rows [B, P] best first, distinct, padded with -1; scores
        [B, P]."""
        s = self.settings
        last = seen_rows[:, : -s.transition_items - 1 : -1]  # newest first
        lists = self.transitions[
            np.where(last < len(self.items), np.maximum(last, 0), 0)
        ]  # nothing followed a new item yet
        weight = (1 / np.arange(1, last.shape[1] + 1, dtype=np.float32))[None, :, None] * (last > 0)[
            :, :, None
        ]  # the k-th newest counts 1 / k
        rows = lists["rows"].astype(np.int64).reshape(len(seen_rows), -1)
        scores = (lists["scores"] * weight).reshape(len(seen_rows), -1)
        rows = np.where(scores > 0, rows, -1)
        rows, scores = sum_by_row(rows, np.where(rows > 0, scores, 0))
        best = np.lexsort((rows, -scores), axis=-1)
        return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)

    # --- one list

    def _merge(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Offers [B, X] and places -> distinct rows [B, N], those first in line, in any order, padded with
        -1."""
        by_row = np.lexsort((places, rows), axis=-1)
        rows, places = np.take_along_axis(rows, by_row, axis=1), np.take_along_axis(places, by_row, axis=1)
        places[:, 1:][rows[:, 1:] == rows[:, :-1]] = np.iinfo(np.int64).max  # the same item, later in line
        wanted = self.sizes.candidates
        if rows.shape[1] < wanted:
            gap = ((0, 0), (0, wanted - rows.shape[1]))
            rows, places = (
                np.pad(rows, gap, constant_values=-1),
                np.pad(places, gap, constant_values=np.iinfo(np.int64).max),
            )
        first = np.argpartition(places, wanted - 1, axis=1)[:, :wanted]
        kept = np.take_along_axis(places, first, axis=1) < np.iinfo(np.int64).max
        return np.where(kept, np.take_along_axis(rows, first, axis=1), -1)

    def _scored(
        self, query: np.ndarray, rows: np.ndarray, transitions: tuple[np.ndarray, np.ndarray], view: LiveView
    ) -> Tensors:
        """Candidates [B, N] in any order -> all candidate_* tensors, by fused score, ties by row, padding
        last."""
        items = read_items(self.item_reader, view, rows)
        embeddings = items.field("embedding")
        scores = self.source_scores(query, rows, embeddings, transitions)
        order = np.lexsort((rows, -fused(rows, scores, self.settings.source_weights)), axis=-1)
        users = np.arange(len(rows))[:, None]
        rows = rows[users, order]  # whole rows move; take_along_axis would move element by element
        return {
            "candidate_rows": rows,
            "candidate_features": items.at(users, order).field("features"),
            "candidate_scores": scores[users, order],
            "candidate_status": (np.zeros(len(rows), np.int64) | items.status_of_users())[:, None],
        }

    def source_scores(
        self,
        query: np.ndarray,
        rows: np.ndarray,
        embeddings: np.ndarray,
        transitions: tuple[np.ndarray, np.ndarray],
    ) -> np.ndarray:
        """Every source's score of every candidate: [B, N, S] float32, S in the order of contract.SOURCES, 0
        where padded."""
        scores = np.zeros((*rows.shape, len(SOURCES)), np.float32)
        scores[..., 0] = np.matmul(embeddings, query.transpose(0, 2, 1)).max(axis=2)
        scores[..., 1] = np.log1p(look_up(rows, *transitions, _STRIDE))
        scores[..., 2] = self.popularity[
            np.where(rows < len(self.popularity), np.maximum(rows, 0), 0)
        ]  # row 0's is 0: so is a new item's
        scores[rows <= 0] = 0
        return scores

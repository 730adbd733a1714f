"""Step 3, recall: finds the N items that each user could want. Sources offer, one list comes out.

    user_embeddings   the index: inner product with each interest vector (Flat; IVF, compressed or not)
    transitions       what followed the user's last items, item to item
    popular           the same list for everyone; fills what the others leave
    content           (where a shop asks for it) what is like the user's last items, taken by nobody or not

Each source offers its best; only eligible items count; an item offered twice counts once; quotas keep a place
for each source. All candidates then get every source's score, and their order is the fused score (weights
fitted at build time), ties by row.

Whose budget is spent before that has the popular list alone; whose is spent afterwards is marked, so that the
ranker leaves the user out (contract.Degraded: POPULAR, RANK_SKIPPED).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from ensemble.activity import touches, touches_width
from ensemble.arrays import Array, Tensors, first_kept, look_up, sum_by_row, without_repeats
from ensemble.contract import QUERY_TENSORS, Degraded
from ensemble.errors import InvalidArgument
from ensemble.index.filters import ItemFilters, RowMask
from ensemble.live.rows import read_items
from ensemble.live.state import LiveView
from ensemble.options import Options
from ensemble.release.pasts import Older, Pasts
from ensemble.spec import ModelSpec
from ensemble.steps.recall_settings import settings_from_json
from ensemble.steps.served import ServedRelease
from ensemble.steps.sources import STRIDE, Batch, Nearest, Popular, Silent, best_first, open_sources
from ensemble.telemetry import Metric

_EXCLUDED = np.concatenate([[0], 1 << np.arange(6, 41, 2)])  # steps of depth: 0, 64, 256, 1024, ...
SPENT_S = 0.01  # a budget with less left is spent: ranking and the way back take longer
_LATER = 1 << 40  # more than any rank: the place in line of what is beyond its source's quota

Kind = TypeVar("Kind")


def fused(rows: Array, scores: Array, weights: tuple[float, ...]) -> Array:
    """Gives the score that sorts candidates: rows [B, N] int64, source scores [B, N, S] -> [B, N] float32,
    -inf where padded."""
    return np.where(rows > 0, scores @ np.array(weights, np.float32), -np.inf)


def _is_full(rows: Array, wanted: int) -> bool:
    """Says whether rows [B, X], padded at the end, have `wanted` for every user."""
    return rows.shape[1] >= wanted and bool((rows[:, wanted - 1] > 0).all())


class Recall:
    """Holds one release's sources, filters and item rows, all memory-mapped."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        release.verify_data("index.faiss", "recall.json", "items.npy", "numbers.npy", "item_ids.npy")
        release.verify_data("transitions.npy", "popular.npy", "vocabularies.json")
        self.schema, self.sizes = release.schema, release.schema.sizes
        self.settings = settings_from_json((release.path / "recall.json").read_text())
        self.items, self.live = release.items, release.live
        self.pasts = Pasts(release)
        self.sources = open_sources(release, self.settings)
        self.item_reader = release.readers.items
        self.filters = ItemFilters(
            release.schema, release.vocabularies.get("items", {}), self.items["codes"], release.item_numbers
        )

    def read(self, options: Options, **tensors: Array) -> Tensors:
        """Refuses one request that asks for what only a search does; InvalidArgument."""
        if any(user.like for user in options.users):
            raise InvalidArgument("like: is an option of search, not of recommend", "call search")
        return {}

    def run(
        self,
        options: Options,
        *,
        seen_rows: Array,
        seen_kinds: Array | None = None,
        seen_recencies: Array | None = None,
        user_id: Array | None = None,
        older: Older | None = None,
        **queries: Array,
    ) -> Tensors:
        """Finds candidates: seen_* [B, W], user_id [B, 1] and query tensors [B, *, D] float32 ->
        candidate_* [B, N…] (contract.py).

        Without kinds and recencies nothing is said of what a user did with a candidate. What a user had
        before seen_rows is `older`; if not given, what the release knows by user_id.
        """
        query = np.concatenate([queries[name] for name in QUERY_TENSORS], axis=1)
        view = self.live.refresh()
        if older is None and user_id is not None:
            older = self.pasts.older(user_id[:, 0], seen_rows)
        excluded = self._excluded(options, seen_rows, older, view)
        late = options.late(SPENT_S)
        if late.all():
            return self._popular(options, seen_rows, excluded, view)
        if late.any():
            return self._without_late(options, late, seen_rows, seen_kinds, seen_recencies, older, queries)
        batch = self._batch(options, query, seen_rows, excluded, view)
        own, offers = self._own(options, seen_rows), self._in_line(self._offers(batch, excluded), self.quotas)
        if own is not None:
            most = best_first(*own)[0][:, : self.sizes.candidates // 2]
            offers = np.concatenate([self._eligible(most, excluded, batch.masks, view), offers], axis=1)
        found = self._scored(batch, self._merge(offers), own)
        state = self._touches(options, seen_rows, seen_recencies, seen_kinds, found["candidate_rows"])
        found["candidate_status"] |= self._status(options, view)
        marked = options.late(SPENT_S)  # by now: the ranker need not see them
        found["candidate_status"][marked] |= Degraded.RANK_SKIPPED
        found["candidate_features"][marked, 0, 0] = np.nan
        return {**found, "candidate_state": state}

    def _without_late(
        self,
        options: Options,
        late: Array,
        seen_rows: Array,
        seen_kinds: Array | None,
        seen_recencies: Array | None,
        older: Older | None,
        queries: Mapping[str, Array],
    ) -> Tensors:
        """Finds candidates for those who have time, and gives the others [B] bool the popular list."""
        parts, order = list[Tensors](), list[Array]()
        for chosen in (~late, late):
            users = np.flatnonzero(chosen)
            past = [None if one is None else one[users] for one in (seen_kinds, seen_recencies)]
            mine = {name: tensor[users] for name, tensor in queries.items()}
            parts.append(
                self.run(
                    options.of(users),
                    seen_rows=seen_rows[users],
                    seen_kinds=past[0],
                    seen_recencies=past[1],
                    older=None if older is None else older.of(users),
                    **mine,
                )
            )
            order.append(users)
        back = np.argsort(np.concatenate(order))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

    def _popular(self, options: Options, seen_rows: Array, excluded: Array, view: LiveView) -> Tensors:
        """Gives the most popular items that may be shown, and says that nobody looked for anything else."""
        source, nobody = self.source(Popular), np.zeros((len(options), 1, self.sizes.embedding), np.float32)
        batch = self._batch(options, nobody, seen_rows, excluded, view)
        rows = self._merge(self._eligible(source.offer(batch), excluded, batch.masks, view))
        shape, s = rows.shape, self.sources.index(source)
        scores = np.zeros((*shape, len(self.sources)), np.float32)
        scores[..., s] = np.where(rows > 0, source.score(batch, rows, scores), 0)
        features = np.zeros((*shape, self.sizes.item_features), np.float32)
        features[:, 0, 0] = np.nan
        status = self._status(options, view) | int(Degraded.RANK_SKIPPED | Degraded.POPULAR)
        return {
            "candidate_rows": rows,
            "candidate_features": features,
            "candidate_scores": scores,
            "candidate_status": status,
            "candidate_state": np.zeros((*shape, touches_width(self.schema)), np.float32),
        }

    def _status(self, options: Options, view: LiveView) -> Array:
        """Says whose filter names a value that no item has [B, 1] int64."""
        return self.filters.status([user.filter for user in options.users], view)

    def _batch(
        self, options: Options, query: Array, seen_rows: Array, excluded: Array, view: LiveView
    ) -> Batch:
        """Gives what these users ask of the sources, query [B, *, D], and how deep each has to go."""
        depths = self._depths(np.bincount(excluded // STRIDE, minlength=len(query)), view)
        masks = self.filters.masks([user.filter for user in options.users], view)
        return Batch(query, seen_rows, view, masks, depths)

    def _depths(self, num_excluded: Array, view: LiveView) -> Array:
        """Gives how deep a source must go for each user [B] int64: N and what may be excluded, `num_excluded`
        [B], in few steps, so that most users of a batch are searched together."""
        steps = _EXCLUDED[np.searchsorted(_EXCLUDED, num_excluded)]
        return np.minimum(self.sizes.candidates + steps, view.num_rows - 1)

    def _touches(
        self,
        options: Options,
        seen_rows: Array,
        seen_recencies: Array | None,
        seen_kinds: Array | None,
        candidate_rows: Array,
    ) -> Array:
        """Gives candidate_state [B, N, G]. What a user has had is no candidate of his unless he asks for it,
        and then all there is to say is 0."""
        state = np.zeros((*candidate_rows.shape, touches_width(self.schema)), np.float32)
        again = np.flatnonzero(~options.exclude_seen)
        if len(again) and seen_recencies is not None and seen_kinds is not None:
            past = (seen_rows[again], seen_recencies[again], seen_kinds[again])
            state[again] = touches(self.schema, *past, candidate_rows[again])
        return state

    def metrics(self) -> list[Metric]:
        """Lists the live items' numbers and the probe's."""
        own = {**self.live.metrics(), **self.source(Nearest).probe.metrics()}
        return [
            Metric(f"peregrine_{name}", (), float(value), is_counter=False) for name, value in own.items()
        ]

    def source(self, kind: type[Kind]) -> Kind:
        """Gives the source of this class."""
        return next(source for source in self.sources if isinstance(source, kind))

    @property
    def quotas(self) -> list[int]:
        """Gives the places kept for each source [S]; one without a quota has what the others leave, one that
        is off leaves its own."""
        return self._places(self.settings.quotas)

    def _places(self, quotas: Mapping[str, int]) -> list[int]:
        """Gives the places that `quotas`, by source, come to, as `quotas` above does."""
        own = [0 if isinstance(s, Silent) else quotas.get(s.name) for s in self.sources]
        left = self.sizes.candidates - sum(quota or 0 for quota in own)
        return [left if quota is None else quota for quota in own]

    # --- what must not come out

    def _excluded(self, options: Options, seen_rows: Array, older: Older | None, view: LiveView) -> Array:
        """Gives sorted keys (user * STRIDE + row) [X] int64 of items that a user excludes, or has seen and
        will not have again."""
        users, columns = np.nonzero((seen_rows > 0) & options.exclude_seen[:, None])
        keys = users * STRIDE + seen_rows[users, columns]
        if older is not None and len(older.owners):
            again = options.exclude_seen[older.owners]
            keys = np.concatenate([keys, older.owners[again] * STRIDE + older.rows[again]])
        owners, ids = options.ids("exclude_items")
        if len(owners):
            keys = np.concatenate([keys, owners * STRIDE + view.rows_from_ids(ids)])
        return np.unique(keys)

    def _eligible(
        self, rows: Array, excluded: Array, masks: Sequence[RowMask | None], view: LiveView
    ) -> Array:
        """Replaces by -1 what of rows [B, X] is excluded, deleted or does not pass its user's filter."""
        keys = rows + np.arange(len(rows))[:, None] * STRIDE
        bad = (rows <= 0) | view.is_deleted(rows) if view.num_deleted else rows <= 0
        if len(excluded):
            place = np.minimum(np.searchsorted(excluded, keys), len(excluded) - 1)
            bad |= excluded[place] == keys
        for user, mask in enumerate(masks):
            if mask is not None:
                bad[user] |= ~mask.passes(rows[user])
        return np.where(bad, -1, rows)

    # --- one list

    def offers(self, options: Options, *, seen_rows: Array, older: Older, **queries: Array) -> list[Array]:
        """Gives, for who chooses quotas, each source's first N eligible items [B, at most N] int64, best
        first, padded with -1; `merged` makes candidates of them."""
        query = np.concatenate([queries[name] for name in QUERY_TENSORS], axis=1)
        view = self.live.refresh()
        excluded = self._excluded(options, seen_rows, older, view)
        batch = self._batch(options, query, seen_rows, excluded, view)
        return self._offers(batch, excluded, is_whole=True)

    def merged(self, offers: list[Array], quotas: Mapping[str, int]) -> Array:
        """Gives the candidates [B, N], in any order and padded with -1, that offers [B, *] of each source
        come to under quotas, by source."""
        return self._merge(self._in_line(offers, self._places(quotas)))

    def _offers(self, batch: Batch, excluded: Array, *, is_whole: bool = False) -> list[Array]:
        """Gives each source's eligible offers [B, at most N], padded with -1.

        They are counted after filtering, so that a quota is filled by items that can be shown. Beyond its
        first N none of a source is needed, and where another has N for everybody, nobody fills up: then, but
        for the whole of what there is, no more than its quota.
        """
        parts = [source.offer(batch) for source in self.sources]
        rows = self._eligible(np.concatenate(parts, axis=1), excluded, batch.masks, batch.view)
        pieces = np.split(rows, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        wanted = self.sizes.candidates
        own = [
            None if source.fills_up else first_kept(piece, wanted)
            for source, piece in zip(self.sources, pieces, strict=True)
        ]
        is_full = not is_whole and any(part is not None and _is_full(part, wanted) for part in own)
        return [
            first_kept(piece, min(quota, wanted) if is_full else wanted) if part is None else part
            for part, piece, quota in zip(own, pieces, self.quotas, strict=True)
        ]

    def _in_line(self, offers: list[Array], quotas: list[int]) -> Array:
        """Gives offers [B, *] of each source as they are in line [B, X]: sources by turns within their quotas
        [S], then beyond them, and last of all what only fills up."""
        places = []
        for s, (source, quota, of) in enumerate(zip(self.sources, quotas, offers, strict=True)):
            rank, later = np.arange(of.shape[1]), _LATER * (2 if source.fills_up else 1)
            places.append(rank * len(offers) + s + (rank >= quota) * later)
        return np.concatenate(offers, axis=1)[:, np.argsort(np.concatenate(places))]

    def _merge(self, rows: Array) -> Array:
        """Gives the first N distinct rows [B, N] of rows [B, X] in line, padded with -1."""
        wanted = self.sizes.candidates
        merged = first_kept(without_repeats(rows), wanted)
        gap = ((0, 0), (0, wanted - merged.shape[1]))
        return np.pad(merged, gap, constant_values=-1) if gap[1][1] else merged

    def _own(self, options: Options, seen_rows: Array) -> tuple[Array, Array] | None:
        """Gives what users who ask for what they had have in their pasts seen_rows [B, W]: rows [B, W]
        ascending, -1 between them, and the log of how often; None where nobody asks, or it counts nothing."""
        if not self.settings.again or options.exclude_seen.all():
            return None
        had = np.where(options.exclude_seen[:, None], -1, seen_rows)
        rows, counts = sum_by_row(had, (had > 0).astype(np.float32))
        return rows, np.log1p(counts)

    def _scored(self, batch: Batch, rows: Array, own: tuple[Array, Array] | None = None) -> Tensors:
        """Gives the candidate_* tensors but the state of rows [B, N] in any order: by fused score, ties by
        row, padding last. What of them is `own`, as _own gives it, follows the past all the more."""
        items = read_items(self.item_reader, batch.view, rows)
        scores = self._scores(batch, rows, items.field("embedding"))
        if own is not None:
            at = self.schema.source_names.index("transitions")
            scores[..., at] += self.settings.again * np.where(rows > 0, look_up(rows, *own, STRIDE), 0)
        order = np.lexsort((rows, -fused(rows, scores, self.settings.source_weights)), axis=-1)
        users = np.arange(len(rows))[:, None]
        rows = rows[users, order]  # whole rows move; take_along_axis would move element by element
        return {
            "candidate_rows": rows,
            "candidate_features": items.at(users, order).field("features"),
            "candidate_scores": scores[users, order],
            "candidate_status": (np.zeros(len(rows), np.int64) | items.status_of_users())[:, None],
        }

    def source_scores(self, query: Array, seen_rows: Array, rows: Array, embeddings: Array) -> Array:
        """Scores any items for the offline path: query [B, M, D], seen_rows [B, W], rows [B, N] and their
        embeddings [B, N, D] -> [B, N, S] float32, S in the schema's order, 0 where padded."""
        return self._scores(Batch(query, seen_rows, self.live.view), rows, embeddings)

    def _scores(self, batch: Batch, rows: Array, embeddings: Array) -> Array:
        """Gives every source's score of every candidate [B, N, S] float32, 0 where padded."""
        scores = np.zeros((*rows.shape, len(self.sources)), np.float32)
        for s, source in enumerate(self.sources):
            scores[..., s] = source.score(batch, rows, embeddings)
        scores[rows <= 0] = 0
        return scores

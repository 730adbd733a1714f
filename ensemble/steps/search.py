"""Steps search_recall and search_reranking: find what fits a query, and order it by relevance and taste.

    words   BM25 over the titles (ensemble/index/words.py)
    text    the cosine of the text's vector with the items' text vectors (ensemble/index/looks.py)
    image   the cosine of the picture's vector with the items' image vectors
    shown   of an item of which nothing is told in words: the cosine of the text's vector with that of the
            item's picture, in the space that both share (ensemble/content/shared_space.py)
    told    of an item without a picture: the cosine of the picture's vector with that of the item's text,
            in the same space

Every finder scores every item, the release's own and live ones, so what is found depends on no index. The
scores become log odds that an item fits (ensemble/steps/search_settings.py); what falls below the least is no
candidate, however much the user would like it. Taste only moves what is left. A query may name items instead
(`like`): then what is known of them is searched for.

Axes: B batch, N candidates, R all rows, P components, K returned.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.content.projection import PROJECTIONS, read_projections
from ensemble.content.shared_space import SHARED, Head, read_heads
from ensemble.contract import IMAGE, QUERY_TENSORS, TEXT, Degraded
from ensemble.index.filters import RowMask
from ensemble.index.looks import Looks, query_rows, shared_file, vectors_file
from ensemble.index.words import FILES, Words, terms_of
from ensemble.live.state import LiveView
from ensemble.live.titles import LiveTitles
from ensemble.options import Options
from ensemble.spec import ModelSpec
from ensemble.steps.finders import Finder, names_of
from ensemble.steps.query import refuse_nothing, texts_of
from ensemble.steps.recall import SPENT_S, Recall
from ensemble.steps.reranking import Reranking
from ensemble.steps.search_settings import SEARCH_FILE, SearchSettings, read_search
from ensemble.steps.served import ServedRelease
from ensemble.steps.sources import STRIDE, Batch

_FOUND = 0.05  # of a finder's score from which it brought an item
_BEHIND = 0.99  # of the best title's x, that pictures alone reach at most: a title that fits stays first


@dataclass(frozen=True)
class Query:
    """Holds what one user searches for."""

    terms: Counter[bytes]
    vectors: dict[str, Array]  # by feature: [P] of length 1, 0 where there is none
    has_text: bool
    has_image: bool
    is_like: bool = False  # nothing but items was named: what comes nearest is wanted, however near


@dataclass(frozen=True)
class Scores:
    """Holds what the finders say of all rows, [R] float32 each; None where a finder was not asked."""

    words: Array
    text: Array | None
    image: Array | None
    has_text: bool
    is_like: bool = False
    shown: Array | None = None  # 0 where an item is told of in words, or has no picture
    told: Array | None = None  # 0 where an item has a picture, or no text

    def x_text(self, settings: SearchSettings) -> Array:
        """Joins words and meaning, and what pictures show instead of them."""
        if self.text is None:
            return self.words
        share = np.float32(settings.words_share)
        x = share * self.words + (1 - share) * np.maximum(self.text, 0)
        if self.shown is None or not settings.shown_weight:
            return x
        return np.maximum(x, beside(self.shown, float(x[1:].max(initial=0)), settings.shown_weight))

    def x_image(self, settings: SearchSettings) -> Array:
        """Gives what pictures say, and what texts tell instead of them; a picture has to be asked for."""
        assert self.image is not None
        if self.told is None or not settings.told_weight:
            return self.image
        best = float(self.image[1:].max(initial=0))
        return np.maximum(self.image, beside(self.told, best, settings.told_weight))

    def relevance(self, settings: SearchSettings) -> tuple[Array, Array]:
        """Gives the log odds that each item fits [R], and whether they are enough [R] bool."""
        odds, fits = [], np.zeros(len(self.words), bool)
        least_text = _FOUND if self.is_like else settings.least_text
        least_image = _FOUND if self.is_like else settings.least_image
        if self.has_text:
            x = self.x_text(settings)
            odds.append(settings.text_slope * x + settings.text_bias)
            fits |= x >= least_text
        if self.image is not None:
            x = self.x_image(settings)
            odds.append(settings.image_slope * x + settings.image_bias)
            fits |= x >= least_image
        return np.mean(odds, axis=0, dtype=np.float32), fits

    def finders(self, rows: Array) -> Array:
        """Says in bits which finders brought rows [n]: [n] int64."""
        found = (self.words[rows] >= _FOUND) * int(Finder.WORDS)
        asked = (
            (self.text, Finder.TEXT),
            (self.image, Finder.IMAGE),
            (self.shown, Finder.SHOWN),
            (self.told, Finder.TOLD),
        )
        for scores, bit in asked:
            if scores is not None:
                found = found | (scores[rows] >= _FOUND) * int(bit)
        return found.astype(np.int64)


def beside(cosines: Array, best: float, weight: float) -> Array:
    """Gives what pictures count [R] beside titles, of which the `best` one fits so well, or titles beside
    pictures: always a little less than that one. Cosines of a text with pictures are of another scale, and
    say less of a query of two words than of a whole title; so do titles, and the best of them says how
    much."""
    return np.float32(best) * np.clip(np.float32(weight) * cosines, 0, np.float32(_BEHIND))


class SearchRecall(Recall):
    """Holds, beside what recall holds, what the finders read; candidates get the scores of recall's sources,
    which the ranker wants."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        super().__init__(model, release)
        release.verify_data(*FILES, PROJECTIONS, "item_titles.npy")
        if (release.path / SEARCH_FILE).exists():
            release.verify_data(SEARCH_FILE)
        self.search = read_search(release.path)
        self.words, self.titles = Words(release.path), LiveTitles(release)
        self._item_titles = release.item_titles
        self.live_words, self._live_titles = self.words.live(), dict[int, str]()
        projections = read_projections(release.path / PROJECTIONS)
        encoded = [feature for feature in release.schema.items.features if feature.encoder]
        release.verify_data(*(vectors_file(feature.name) for feature in encoded))
        self.projections = {f.name: projections[f.name] for f in encoded}
        self.looks = {f.name: Looks(f, release.path) for f in encoded}
        self._heads, self.shared = self._open_space(release)

    def _open_space(self, release: ServedRelease) -> tuple[dict[str, Head], dict[str, Looks]]:
        """Opens the space of titles and pictures: the heads of both, and the items' places in it; none where
        a release has none. One that was built before photos found titles has the pictures' places alone."""
        if not (release.path / SHARED).exists():
            return {}, {}
        release.verify_data(SHARED)
        heads = read_heads(release.path / SHARED)
        features = {name: looks.feature for name, looks in self.looks.items() if name in heads}
        placed = {name: f for name, f in features.items() if (release.path / shared_file(name)).exists()}
        release.verify_data(*map(shared_file, placed))
        return heads, {name: Looks(f, release.path, heads[name]) for name, f in placed.items()}

    def read(self, options: Options, **tensors: Array) -> Tensors:
        """Refuses one request that asks for nothing; InvalidArgument."""
        texts = texts_of(tensors["query_text"])
        if "query_image" in tensors:  # the whole pipeline is one step
            has_image = np.array(
                [one is not None and len(one) > 0 for one in tensors["query_image"][:, 0]], bool
            )
        else:
            has_image = tensors["query_look"].any(axis=1)
        refuse_nothing(options, np.array(list(map(bool, texts)), bool), has_image)
        out = np.empty((len(texts), 1), object)
        out[:, 0] = texts
        return {"query_text": out}

    def run(  # type: ignore[override]
        self,
        options: Options,
        *,
        query_text: Array,
        query_words: Array,
        query_look: Array,
        seen_rows: Array,
        seen_kinds: Array,
        seen_recencies: Array,
        user_id: Array,
        **queries: Array,
    ) -> Tensors:
        """Finds candidates: query_text [B, 1], query_words [B, V], query_look [B, Z] and what recall takes ->
        candidate_* [B, N…] (contract.py), NO_MATCH in the status of whom nothing fits."""
        options = options.of_search()
        interests = np.concatenate([queries[name] for name in QUERY_TENSORS], axis=1)
        view = self.live.refresh()
        for row, title in self.titles.news(view):
            self.live_words.put(row, title)
            self._live_titles[row] = title
        asked, own, unknown = self.queries(options, query_text, query_words, query_look, view)
        excluded = self._excluded(options, seen_rows, self.pasts.older(user_id[:, 0], seen_rows), view)
        excluded = np.union1d(excluded, own)
        masks = self.filters.masks([user.filter for user in options.users], view)
        found = [self._found(row, query, excluded, masks[row], view) for row, query in enumerate(asked)]
        rows, relevance, finders = (np.stack(parts) for parts in zip(*found, strict=True))
        batch = Batch(interests, seen_rows, view, masks, np.full(len(rows), self.sizes.candidates))
        candidates = self._scored(batch, rows)
        state = self._touches(options, seen_rows, seen_recencies, seen_kinds, candidates["candidate_rows"])
        order = _places(rows, candidates["candidate_rows"])
        candidates["candidate_status"] |= self._status(options, view)
        candidates["candidate_status"] |= np.where(rows[:, :1] > 0, 0, int(Degraded.NO_MATCH))
        candidates["candidate_status"][unknown] |= int(Degraded.UNKNOWN_ITEMS)
        # The ranker need not see them: what fits is found, in order of relevance
        late = options.late(SPENT_S)
        candidates["candidate_status"][late] |= int(Degraded.RANK_SKIPPED)
        candidates["candidate_features"][late, 0, 0] = np.nan
        return {
            **candidates,
            "candidate_state": state,
            "candidate_relevance": np.take_along_axis(relevance, order, axis=1),
            "candidate_finders": np.take_along_axis(finders, order, axis=1),
        }

    # --- what is searched for

    def queries(
        self, options: Options, texts: Array, words: Array, look: Array, view: LiveView
    ) -> tuple[list[Query], Array, Array]:
        """Gives each user's query, the keys (user * STRIDE + row) [X] of items that it is made of, and the
        users [Y] who name items that nobody knows."""
        vectors = {
            name: query_rows(self.projections[name], words if looks.feature.encoder == TEXT else look)
            for name, looks in self.looks.items()
        }
        owners, ids = options.ids("like")
        rows = view.rows_from_ids(ids) if len(owners) else np.zeros(0, np.int64)
        asked = []
        for user, text in enumerate(texts[:, 0].tolist()):
            mine = rows[owners == user]
            terms, own = terms_of(str(text or "")), {name: v[user] for name, v in vectors.items()}
            is_like = len(mine) > 0 and not text and not any(v.any() for v in own.values())
            for row in mine[mine > 0].tolist():
                terms = terms + terms_of(self._title(row))
            if len(mine):
                own = {name: self._with(v, self.looks[name], mine[mine > 0], view) for name, v in own.items()}
            there = {self.looks[name].feature.encoder for name, vector in own.items() if vector.any()}
            has_text = bool(terms) or TEXT in there or IMAGE not in there
            asked.append(Query(terms, own, has_text, IMAGE in there, is_like))
        return asked, owners * STRIDE + rows, np.unique(owners[rows == 0])

    def _with(self, vector: Array, looks: Looks, rows: Array, view: LiveView) -> Array:
        """Adds the items at `rows` to a query [P], each as much as the query itself."""
        total = vector + looks.of_rows(view, rows).sum(axis=0)
        return total / np.maximum(np.linalg.norm(total), 1e-9)

    def _title(self, row: int) -> str:
        """Gives an item's title as it is now."""
        if row in self._live_titles:
            return self._live_titles[row]
        own = self._item_titles[row] if row < len(self._item_titles) else b""
        return bytes(own).decode(errors="replace")

    # --- what fits

    def scores(self, query: Query, view: LiveView) -> Scores:
        """Asks the finders about every row."""
        found: dict[str, list[Array]] = {TEXT: [], IMAGE: []}
        for name, looks in self.looks.items():
            if query.vectors[name].any():
                found[looks.feature.encoder].append(looks.scores(view, query.vectors[name][None])[0])
        words = self.words.scores(query.terms, view.num_rows, self.live_words)
        if view.num_deleted:  # nothing is measured by what is gone
            gone = view.state.deleted[: view.num_rows]
            for scores in (words, *found[TEXT], *found[IMAGE]):
                scores[gone] = 0
        best = {model: np.max(parts, axis=0) if parts else None for model, parts in found.items()}
        shown = None
        if self.search.shown_weight and found[TEXT]:
            cosines = self.cosines(query, view, TEXT, IMAGE)
            untold = (words == 0) & np.all([scores == 0 for scores in found[TEXT]], axis=0)
            shown = None if cosines is None else np.where(untold, cosines, 0)
        told = None
        if self.search.told_weight and found[IMAGE]:
            cosines = self.cosines(query, view, IMAGE, TEXT)
            unseen = np.all([scores == 0 for scores in found[IMAGE]], axis=0)
            told = None if cosines is None else np.where(unseen, cosines, 0)
        return Scores(words, best[TEXT], best[IMAGE], query.has_text, query.is_like, shown, told)

    def cosines(self, query: Query, view: LiveView, asked: str, of: str) -> Array | None:
        """Compares a query's text with the pictures of all items [R] in the space that both share, or its
        picture with their texts (`asked` and `of`: TEXT, IMAGE); None where nothing of that kind is asked,
        or the release has no such space."""
        heads = [
            (name, head) for name, head in self._heads.items() if self.looks[name].feature.encoder == asked
        ]
        units = [head.unit(query.vectors[name][None]) for name, head in heads]
        placed = [looks for looks in self.shared.values() if looks.feature.encoder == of]
        found = [looks.scores(view, unit)[0] for looks in placed for unit in units if unit.any()]
        return np.max(found, axis=0) if found else None

    def _found(
        self, user: int, query: Query, excluded: Array, mask: RowMask | None, view: LiveView
    ) -> tuple[Array, Array, Array]:
        """Gives the N best of what fits one user's query: rows [N], -1 where there are fewer, log odds [N]
        and finders [N]."""
        scores = self.scores(query, view)
        relevance, fits = scores.relevance(self.search)
        fits[0] = False
        mine = excluded[(excluded // STRIDE) == user] % STRIDE
        fits[mine[mine < len(fits)]] = False
        rows = np.flatnonzero(fits)
        if view.num_deleted:
            rows = rows[~view.is_deleted(rows)]
        if mask is not None:
            rows = rows[mask.passes(rows)]
        wanted = self.sizes.candidates
        if len(rows) > wanted:
            # ties at the edge by row, so that a list does not depend on how they are cut
            rows = rows[np.lexsort((rows, -relevance[rows]))[:wanted]]
        gap = (0, wanted - len(rows))
        padded = np.pad(relevance[rows], gap), np.pad(scores.finders(rows), gap)
        return np.pad(rows, gap, constant_values=-1), *padded


def _places(rows: Array, ordered: Array) -> Array:
    """Says where in rows [B, N] each of `ordered` [B, N], the same rows in another order, stands: [B, N]."""
    by_row = np.argsort(rows, axis=1, kind="stable")
    back = np.argsort(np.argsort(ordered, axis=1, kind="stable"), axis=1, kind="stable")
    return np.take_along_axis(by_row, back, axis=1)


class SearchReranking(Reranking):
    """Orders what was found: relevance, moved by taste, under the request's rules."""

    def __init__(self, model: ModelSpec, release: ServedRelease) -> None:
        super().__init__(model, release)
        if (release.path / SEARCH_FILE).exists():
            release.verify_data(SEARCH_FILE)
        self.taste_weight = read_search(release.path).taste_weight  # in log odds of relevance

    def run(  # type: ignore[override]
        self,
        options: Options,
        *,
        candidate_rows: Array,
        candidate_probabilities: Array,
        candidate_scores: Array,
        candidate_relevance: Array,
        candidate_finders: Array,
        user_status: Array,
        candidate_status: Array,
    ) -> Tensors:
        """Makes of candidate_* [B, N…] the answer [B, K…], K the largest top_k of the batch (contract.py)."""
        view = self.live.refresh()
        probabilities = np.nan_to_num(candidate_probabilities, nan=0.0, posinf=0.0, neginf=0.0)
        there = (candidate_rows > 0) & (candidate_rows < view.num_rows)
        liked = taste(self.blend(options, probabilities, candidate_scores), there)
        skipped = (candidate_status[:, 0] & Degraded.RANK_SKIPPED) > 0
        liked[skipped], probabilities[skipped] = 0, 0
        odds = candidate_relevance + self.taste_weight * liked
        scores = np.where(there, 1 / (1 + np.exp(-np.clip(odds, -80, 80))), -np.inf).astype(np.float32)
        order = self.order(options, candidate_rows, np.where(there, odds, -np.inf), view)
        answer = self.answer(options, order, candidate_rows, scores, probabilities, view)
        bits = np.where(answer["item_ids"] != b"", np.take_along_axis(candidate_finders, order, axis=1), 0)
        names = np.array([names_of(bit) for bit in range(1 << len(Finder))], object)
        return {**self.counted(answer, user_status | candidate_status), "finders": names[bits]}


def taste(blended: Array, there: Array) -> Array:
    """Turns the ranker's scores [B, N] into places from -1, the least liked, to 1 among those that are there
    [B, N] bool; equals share one. A single one has 0."""
    masked = np.where(there, blended, np.inf)
    order = np.argsort(masked, axis=1, kind="stable")
    ordered = np.take_along_axis(masked, order, axis=1)
    at = np.broadcast_to(np.arange(blended.shape[1]), blended.shape)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((len(blended), 1), bool)
    low = np.maximum.accumulate(np.where(np.hstack([edge, differs]), at, 0), axis=1)
    ends = np.where(np.hstack([differs, edge]), at, blended.shape[1])
    high = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    count = there.sum(axis=1, keepdims=True)
    places = np.where(count > 1, (low + high) / np.maximum(count - 1, 1) - 1, 0).astype(np.float32)
    out = np.zeros(blended.shape, np.float32)
    np.put_along_axis(out, order, places, axis=1)
    return np.where(there, out, 0)

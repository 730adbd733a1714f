"""Fits how a search orders what it finds: on queries made of titles, asked of the release as it will be
served.

What words and meaning weigh is what finds most items again (NDCG@10) while a full title finds its own first;
log odds are a logistic regression on what was found. Taste gets the largest weight that loses at most 2% of
that NDCG. What pictures show of a text, and texts tell of a picture, have choices of their own
(builders/search/shown.py, told.py). All is chosen on one half of the items and told of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset
from builders.index.staged import StagedRelease
from builders.metrics import ndcg
from builders.search.measures import FIRST, MOST_LOST, TOP, full_titles_first, mean_ndcg, place_of
from builders.search.queries import FULL, KINDS, Queries, queries_of
from builders.search.shown import fit_shown, judged_rows
from builders.search.told import fit_told
from ensemble.arrays import Array, Tensors
from ensemble.contract import IMAGE, SEARCH
from ensemble.local import LocalPipeline, column_of
from ensemble.options import default_options
from ensemble.steps.search import Query, SearchRecall, SearchReranking, taste
from ensemble.steps.search_settings import SearchSettings

_SHARES = tuple(np.round(np.arange(0, 1.01, 0.1), 1).tolist())
_TASTES = (3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)
_OTHERS = 20  # items beside the right one that odds are fitted on, the nearest of each query
_MISSED = 0.02  # of right items that may lie below the least
_NONSENSE = 40  # texts that mean nothing


@dataclass(frozen=True)
class Found:
    """Holds what the finders said of Q queries: of the right item [Q], and of the nearest others [Q, O]."""

    words: Array
    text: Array
    other_words: Array
    other_text: Array
    ranks: Array  # [Q, shares] int64: the right item's place, from 0, under each share of words


def fit_search(dataset: Dataset, staged: Path, seed: int = 0) -> tuple[SearchSettings, dict[str, Any]]:
    """Fits the settings on a staged release; gives what the report says of them beside."""
    release, rng = StagedRelease(staged), np.random.default_rng(seed)
    pipeline = LocalPipeline(release, SEARCH)
    try:
        recall = pipeline.steps["search_recall"]
        assert isinstance(recall, SearchRecall)
        queries = queries_of(dataset, release, rng, judged_rows(dataset) if recall.shared else None)
        if not len(queries.rows):
            return SearchSettings(), {}
        return _fitted(dataset, pipeline, recall, queries, rng)
    finally:
        release.close()


def _fitted(
    dataset: Dataset,
    pipeline: LocalPipeline,
    recall: SearchRecall,
    queries: Queries,
    rng: np.random.Generator,
) -> tuple[SearchSettings, dict[str, Any]]:
    """Fits on every other item, and tells of the rest."""
    asked = _queries(pipeline, recall, queries.texts)
    found = _ask(recall, asked, queries.rows)
    _, item = np.unique(queries.rows, return_inverse=True)
    tuned = item % 2 == 0 if item.max() else np.ones(len(item), bool)
    told = ~tuned if (~tuned).any() else tuned
    share_at = _best_share(found.ranks[tuned], queries.kinds[tuned])
    settings = _with_odds(SearchSettings(words_share=_SHARES[share_at]), found, tuned)
    settings = _with_images(settings, recall, rng)
    weight, shown = fit_shown(dataset, recall, asked, queries, settings)
    settings = replace(settings, shown_weight=weight)
    weight, told_of = fit_told(dataset, recall, settings, np.random.default_rng(len(queries.rows)))
    settings = replace(settings, told_weight=weight)
    titles = [text for text, kind in zip(queries.texts, queries.kinds, strict=True) if kind == FULL]
    settings = replace(settings, probe=titles[0][:200] if titles else queries.texts[0])
    recall.search = settings
    ranks = _ranks_by_taste(dataset, pipeline, queries, rng)
    settings = replace(settings, taste_weight=_TASTES[_best_taste(ranks[tuned], queries.kinds[tuned])])
    at = _TASTES.index(settings.taste_weight)
    report = {
        "queries": int(told.sum()),
        "ways": {
            name: _figures(found.ranks[told, place], queries.kinds[told])
            for name, place in (("words", len(_SHARES) - 1), ("text", 0), ("both", share_at))
        },
        "with_taste": _figures(ranks[told, at], queries.kinds[told]),
        "without_taste": _figures(ranks[told, -1], queries.kinds[told]),
        "shown": shown,
        "told": told_of,
        "settings": vars(settings),
        "nonsense_refused": _refused(pipeline, recall, rng),
    }
    return settings, report


# --- what the finders say


def _ask(recall: SearchRecall, asked: list[Query], own: Array) -> Found:
    """Asks words and meaning about all rows, query by query, each made of the item at its own row [Q]."""
    view, parts = recall.live.view, list[tuple[Any, ...]]()
    for query, row in zip(asked, own.tolist(), strict=True):
        scores = recall.scores(query, view)
        words, text = scores.words, scores.text if scores.text is not None else np.zeros_like(scores.words)
        text = np.maximum(text, 0)
        both = [share * words + (1 - share) * text for share in _SHARES]
        ranks = [place_of(x, row) for x in both]
        near = np.argsort(-both[len(_SHARES) // 2], kind="stable")[: _OTHERS + 1]
        near = near[near != row][:_OTHERS]
        near = np.pad(near, (0, _OTHERS - len(near)))
        parts.append((words[row], text[row], words[near], text[near], ranks))
    return Found(*(np.array(column) for column in zip(*parts, strict=True)))


def _queries(pipeline: LocalPipeline, recall: SearchRecall, texts: list[str]) -> list[Query]:
    """Makes queries of texts as the steps do, some at a time."""
    size, out = pipeline.spec.max_batch, list[Query]()
    for start in range(0, len(texts), size):
        part = column_of(texts[start : start + size])
        options = default_options(len(part))
        words = pipeline.steps["text_query"].run(options, query_text=part)["query_words"]
        look = np.zeros((len(part), pipeline.spec.model("image_query").outputs[0].dims[0] or 1), np.float32)
        out += recall.queries(options, part, words, look, recall.live.view)[0]
    return out


def _best_share(ranks: Array, kinds: Array) -> int:
    """Chooses the share of words: of those by which full titles find their own, the one that finds most."""
    gains = np.array([mean_ndcg(ranks[:, at], kinds) for at in range(ranks.shape[1])])
    first = full_titles_first(ranks, kinds)
    allowed = first >= min(FIRST, float(first.max()))
    return int(np.argmax(np.where(allowed, gains, -1)))


def _with_odds(settings: SearchSettings, found: Found, tuned: Array) -> SearchSettings:
    """Fits the log odds of a text, and the least that fits."""
    share = settings.words_share
    right = share * found.words[tuned] + (1 - share) * found.text[tuned]
    others = (share * found.other_words[tuned] + (1 - share) * found.other_text[tuned]).ravel()
    slope, bias = _logistic(np.concatenate([right, others]), np.repeat([1.0, 0.0], [len(right), len(others)]))
    least = float(np.clip(np.quantile(right, _MISSED), 0.1, 0.6))
    return replace(settings, text_slope=slope, text_bias=bias, least_text=least)


def _logistic(x: Array, y: Array) -> tuple[float, float]:
    """Fits P(y = 1) = 1 / (1 + exp(-(slope x + bias))) by Newton's method, lightly regularized; a slope is
    never below 1, or a better match could count for less."""
    design, beta = np.stack([x, np.ones_like(x)], axis=1).astype(np.float64), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -50, 50)))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-2 * np.eye(2)
        beta += np.linalg.solve(hessian, design.T @ (y - p) - 1e-2 * beta)
    return max(1.0, float(beta[0])), float(beta[1])


def _with_images(settings: SearchSettings, recall: SearchRecall, rng: np.random.Generator) -> SearchSettings:
    """Says from which cosine on a picture fits: nearer than most items are to their nearest other; odds are
    even there, and 1 : 150 at a cosine of 1."""
    nearest = []
    for looks in recall.looks.values():
        if looks.feature.encoder != IMAGE:
            continue
        there = np.flatnonzero(looks.own.any(axis=1))
        for row in rng.choice(there, min(100, len(there)), replace=False).tolist() if len(there) > 1 else []:
            cosines = looks.own @ looks.own[row]
            cosines[row] = -1
            nearest.append(float(cosines[there].max()))
    if not nearest:
        return settings
    least = float(np.clip(np.quantile(nearest, 0.05), 0.1, 0.6))
    slope = 5 / (1 - least)
    return replace(settings, least_image=least, image_slope=slope, image_bias=-slope * least)


# --- taste


def _ranks_by_taste(
    dataset: Dataset, pipeline: LocalPipeline, queries: Queries, rng: np.random.Generator
) -> Array:
    """Gives the place of each query's item [Q, weights] for a user drawn for it, under each weight of taste;
    as behind all others where it was not found."""
    reranking, size = pipeline.steps["search_reranking"], pipeline.spec.max_batch
    assert isinstance(reranking, SearchReranking)
    users = dataset.user_ids[rng.integers(0, dataset.num_users, len(queries.rows))]
    out = np.full((len(queries.rows), len(_TASTES)), 1 << 30, np.int64)
    for start in range(0, len(users), size):
        known = _before_reranking(pipeline, users[start : start + size], queries.texts[start : start + size])
        rows, there = known["candidate_rows"], known["candidate_rows"] > 0
        options = default_options(len(rows))
        blended = reranking.blend(options, known["candidate_probabilities"], known["candidate_scores"])
        liked, own = taste(blended, there), queries.rows[start : start + size]
        for at, weight in enumerate(_TASTES):
            odds = np.where(there, known["candidate_relevance"] + weight * liked, -np.inf)
            order = np.lexsort((rows, -odds), axis=-1)
            hit = np.take_along_axis(rows, order, axis=1) == own[:, None]
            out[start : start + size, at] = np.where(hit.any(axis=1), hit.argmax(axis=1), 1 << 30)
    return out


def _before_reranking(pipeline: LocalPipeline, users: Array, texts: list[str]) -> Tensors:
    """Runs a search up to the last step: all tensors."""
    known: Tensors = {"user_id": users[:, None], "query_text": column_of(texts)}
    known["query_image"] = np.full((len(texts), 1), None, object)
    for model in pipeline.spec.models[:-1]:
        inputs = {tensor.name: known[tensor.name] for tensor in model.inputs}
        known |= pipeline.steps[model.name].run(default_options(len(texts)), **inputs)
    return known


def _best_taste(ranks: Array, kinds: Array) -> int:
    """Chooses the largest weight of taste that loses at most 2% of NDCG, and by which full titles still find
    their own item first, where they do without it."""
    without = mean_ndcg(ranks[:, -1], kinds)
    first = full_titles_first(ranks, kinds)
    for at in range(len(_TASTES)):
        keeps = mean_ndcg(ranks[:, at], kinds) >= (1 - MOST_LOST) * without
        if keeps and first[at] >= min(FIRST, float(first[-1])):
            return at
    return len(_TASTES) - 1


# --- what is told


def _figures(ranks: Array, kinds: Array) -> dict[str, Any]:
    """Gives NDCG@10 of all kinds together and of each, and how often a full title finds its item first."""
    full = ranks[kinds == FULL]
    return {
        "ndcg@10": mean_ndcg(ranks, kinds),
        "full_title_first": float((full == 0).mean()) if len(full) else None,
        "by_kind": {k: float(ndcg(ranks[kinds == k], TOP)) for k in KINDS if (kinds == k).any()},
    }


def _refused(pipeline: LocalPipeline, recall: SearchRecall, rng: np.random.Generator) -> float:
    """Gives the share of texts of random letters that nothing fits."""
    letters = np.array(list("bcdfghjklmnpqrstvwxz"))
    texts = [" ".join("".join(rng.choice(letters, 8)) for _ in range(2)) for _ in range(_NONSENSE)]
    fits = []
    for query in _queries(pipeline, recall, texts):
        fits.append(bool(recall.scores(query, recall.live.view).relevance(recall.search)[1][1:].any()))
    return 1 - float(np.mean(fits))

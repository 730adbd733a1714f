"""Recall's sources are a list: what each offers, how it scores, and what a further one takes."""

from __future__ import annotations

import dataclasses

import numpy as np
from random_release import SETTINGS, make_release, open_recall

from ensemble.arrays import without_repeats
from ensemble.contract import SOURCES
from ensemble.options import default_options
from ensemble.steps import sources
from ensemble.steps.sources import Batch, Nearest, Popular, Transitions


class Favourites:
    """Offers row 7 to everyone, and scores it 9."""

    name, quota, fills_up = "favourites", 1, False

    def __init__(self, release, settings):
        self.release = release

    def offer(self, batch):
        return np.full((len(batch.query), 1), 7)

    def score(self, batch, rows, embeddings):
        return np.where(rows == 7, 9, 0)


def test_the_sources_stand_in_the_contracts_order(tmp_path, rng):
    recall = open_recall(make_release(tmp_path, rng))
    assert [source.name for source in recall.sources] == list(SOURCES)
    assert [type(source) for source in recall.sources] == [Nearest, Transitions, Popular]
    assert recall.quotas == [24 - 8 - 3, 8, 3]


def test_a_further_source_is_one_class_and_one_name(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", (*SOURCES, "favourites"))
    monkeypatch.setitem(sources._KINDS, "favourites", Favourites)
    weights = dataclasses.replace(SETTINGS, source_weights=(1.0, 0.5, 0.1, 1.0))
    recall = open_recall(make_release(tmp_path, rng, num_items=500, settings=weights))
    query = rng.standard_normal((20, 1, 8), dtype=np.float32)
    answer = recall.run(default_options(20), seen_rows=np.full((20, 12), -1), user_embeddings=query)
    is_favourite = answer["candidate_rows"] == 7
    assert is_favourite.sum(axis=1).tolist() == [1] * 20
    assert answer["candidate_scores"].shape == (20, 24, 4)
    np.testing.assert_array_equal(answer["candidate_scores"][..., 3], np.where(is_favourite, 9, 0))
    assert recall.quotas == [24 - 8 - 3 - 1, 8, 3, 1]


def test_several_interests_offer_in_turns(tmp_path, rng):
    """The best of each interest comes before the second of any."""
    release = make_release(tmp_path, rng)
    recall, query = open_recall(release), rng.standard_normal((5, 3, 8), dtype=np.float32)
    nearest = recall.source(Nearest)
    offers = nearest.offer(
        Batch(query, np.full((5, 12), -1), recall.live.view, [None] * 5, depths=np.full(5, 10))
    )
    inner = query @ release.items["embedding"][1:].T
    best = 1 + np.argsort(-inner, axis=2)[:, :, :10]
    in_turns = without_repeats(best.transpose(0, 2, 1).reshape(5, 30))
    assert (in_turns == -1).any(), "what two interests offer stands once"
    np.testing.assert_array_equal(offers, in_turns)


def test_what_followed_is_looked_up_once_a_batch(tmp_path, rng, monkeypatch):
    recall = open_recall(make_release(tmp_path, rng))
    calls, summed = [], Transitions._summed
    monkeypatch.setattr(Transitions, "_summed", lambda *a: calls.append(a) or summed(*a))
    seen = rng.integers(1, 120, (6, 12))
    recall.run(
        default_options(6),
        seen_rows=seen,
        user_embeddings=rng.standard_normal((6, 1, 8), dtype=np.float32),
    )
    assert len(calls) == 1


def test_offline_scores_are_those_of_the_answer(tmp_path, rng):
    release = make_release(tmp_path, rng)
    recall, seen = open_recall(release), rng.integers(1, 120, (6, 12))
    query = rng.standard_normal((6, 1, 8), dtype=np.float32)
    answer = recall.run(default_options(6), seen_rows=seen, user_embeddings=query)
    rows = answer["candidate_rows"]
    scores = recall.source_scores(query, seen, rows, release.items["embedding"][rows])
    np.testing.assert_array_equal(scores, answer["candidate_scores"])

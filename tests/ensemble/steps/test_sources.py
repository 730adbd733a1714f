"""Recall's sources are a list: what each offers, how it scores, and what a further one takes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from random_release import SETTINGS, make_release, open_recall, schema_of

from ensemble.arrays import without_repeats
from ensemble.errors import ReleaseError
from ensemble.options import default_options
from ensemble.schema import DEFAULT_SOURCES, SOURCE_KINDS, RecallSource, schema_from_json
from ensemble.steps.sources import Batch, Nearest, Popular, Transitions


class Favourites:
    """Offers row 7 to everyone, and scores it 9."""

    name, fills_up = "favourites", False

    def __init__(self, release, settings):
        self.release = release

    def offer(self, batch):
        return np.full((len(batch.query), 1), 7)

    def score(self, batch, rows, embeddings):
        return np.where(rows == 7, 9, 0)


def test_the_sources_stand_in_the_contracts_order(tmp_path, rng):
    recall = open_recall(make_release(tmp_path, rng))
    assert [source.name for source in recall.sources] == ["user_embeddings", "transitions", "popular"]
    assert [type(source) for source in recall.sources] == [Nearest, Transitions, Popular]
    assert recall.quotas == [24 - 8 - 3, 8, 3]


def test_a_further_source_is_one_class_and_one_name(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(SOURCE_KINDS, "favourites", (f"{__name__}:Favourites", 0.1))
    schema = dataclasses.replace(schema_of(), sources=(*DEFAULT_SOURCES, RecallSource("favourites", 0.1)))
    quotas = {**SETTINGS.quotas, "favourites": 1}
    settings = dataclasses.replace(SETTINGS, quotas=quotas, source_weights=(1.0, 0.5, 0.1, 1.0))
    recall = open_recall(make_release(tmp_path, rng, num_items=500, schema=schema, settings=settings))
    query = rng.standard_normal((20, 1, 8), dtype=np.float32)
    answer = recall.run(default_options(20), seen_rows=np.full((20, 12), -1), user_embeddings=query)
    is_favourite = answer["candidate_rows"] == 7
    assert is_favourite.sum(axis=1).tolist() == [1] * 20
    assert answer["candidate_scores"].shape == (20, 24, 4)
    np.testing.assert_array_equal(answer["candidate_scores"][..., 3], np.where(is_favourite, 9, 0))
    assert recall.quotas == [24 - 8 - 3 - 1, 8, 3, 1]


def test_a_source_that_is_off_offers_and_says_nothing(tmp_path, rng):
    """Its places go to the source that has what the others leave."""
    settings = dataclasses.replace(SETTINGS, off=("transitions",))
    recall = open_recall(make_release(tmp_path, rng, num_items=500, settings=settings))
    assert recall.quotas == [24 - 3, 0, 3]
    query, seen = rng.standard_normal((20, 1, 8), dtype=np.float32), rng.integers(1, 500, (20, 12))
    answer = recall.run(default_options(20), seen_rows=seen, user_embeddings=query)
    assert not answer["candidate_scores"][..., 1].any()
    assert (answer["candidate_rows"] > 0).all()


def test_a_source_of_a_later_peregrine_is_refused_by_name(tmp_path, rng):
    schema = dataclasses.replace(schema_of(), sources=(*DEFAULT_SOURCES, RecallSource("dreams", 0.1)))
    with pytest.raises(ReleaseError, match=r"^recall source 'dreams' is unknown to this Peregrine"):
        open_recall(make_release(tmp_path, rng, schema=schema))


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


def test_a_release_of_before_quotas_were_fitted_is_read():
    raw = json.loads(schema_of().to_json())
    for source in raw["sources"]:
        del source["is_set"]
    assert schema_from_json(json.dumps(raw)) == schema_of()

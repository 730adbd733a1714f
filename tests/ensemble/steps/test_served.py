"""What the steps of a process share: one reader of rows, one view of the live items, one set of numbers."""

from __future__ import annotations

import threading

import pytest
from random_release import make_release, open_recall

from ensemble.local import FusedStep, LocalPipeline
from ensemble.steps.features import FeatureLookup
from ensemble.steps.served import open_served
from ensemble.tiers.settings import VARIABLE, TierSettings, write_settings


@pytest.fixture
def redis_nowhere(monkeypatch, tmp_path):
    """Settings of a Redis that does not answer: the tiers have numbers, the snapshot answers."""
    write_settings(tmp_path / "tiers.json", TierSettings("redis://127.0.0.1:1"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tiers.json"))


def tier_numbers(metrics: list) -> list[tuple]:
    return [one[:2] for one in metrics if one.name.startswith("peregrine_tier_")]


def test_all_steps_of_a_pipeline_share_one_reader_and_one_view_of_the_items(tiny_repository):
    release = open_served(tiny_repository, "r1")
    steps = LocalPipeline(release).steps
    assert steps["features"].user_reader is release.readers.users
    assert steps["features"].item_reader is steps["recall"].item_reader is release.readers.items
    assert steps["features"].live is steps["recall"].live is steps["reranking"].live is release.live


@pytest.mark.redis
def test_the_tiers_numbers_come_once_from_a_pipeline_and_from_the_fused_step(tiny_repository, redis_nowhere):
    release = open_served(tiny_repository, "r1")
    pipeline = LocalPipeline(release)
    pipeline.recommend(["u1", "nobody"])
    once = tier_numbers(release.metrics())
    assert len(once) == len(set(once)) > 10
    assert tier_numbers(pipeline.metrics()) == once
    fused = FusedStep(release.pipeline.fused, release)
    # What python_model.py publishes.
    published = tier_numbers([*release.metrics(), *fused.metrics()])
    assert published == once
    assert not [labels for _, labels in published if "step" in dict(labels)]
    recalls = [one for one in pipeline.metrics() if one.name == "peregrine_recall_at_n"]
    assert [dict(one.labels)["step"] for one in recalls] == ["recall"]
    release.close()


@pytest.mark.redis
def test_two_steps_of_one_release_count_into_the_same_numbers(tmp_path, rng, redis_nowhere):
    release = make_release(tmp_path / "repository", rng)
    features, recall = FeatureLookup(release.model("features"), release), open_recall(release)
    assert features.item_reader is recall.item_reader
    once = tier_numbers(release.metrics())
    assert {dict(labels)["table"] for _, labels in once if "table" in dict(labels)} == {"users", "items"}
    assert len(once) == len(set(once))
    release.close()


def test_what_no_step_has_asked_for_is_not_opened(tmp_path, rng):
    before = set(threading.enumerate())
    release = make_release(tmp_path, rng)
    assert release.metrics() == []
    release.close()
    assert not {"live", "readers"} & vars(release).keys()
    assert set(threading.enumerate()) <= before

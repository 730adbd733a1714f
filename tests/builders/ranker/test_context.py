"""What an exposure's context tells is learned, and a request need not say any."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_dataset import SCHEMA, TASKS, toy_dataset, toy_embeddings, zero_scores

from builders.ranker.config import TINY_TRAINING
from builders.ranker.lists import lists_from_impressions, states_of
from builders.ranker.trainer import RankerTrainer
from builders.ranker.training import train_ranker
from ensemble.schema import ContextFeature

CONTEXT = (ContextFeature("device", "category", ("phone", "tv")), ContextFeature("hour", "number"))
CONFIG = replace(TINY_TRAINING, epochs=4, batch=256, tried_rows=(), context_dropout=0.2)


def _told(impressions, rng):
    """The same impressions, mostly clicked on a phone and hardly on a television; others may be either."""
    count = len(impressions.times)
    device = rng.integers(1, 3, count).astype(np.float32)
    labels = np.full((count, 3), np.nan, np.float32)
    labels[:, 0] = rng.random(count) < np.where(device == 1, 0.7, 0.1)
    clicked = labels[:, 0] == 1
    labels[clicked, 1], labels[clicked, 2] = rng.random(clicked.sum()) < 0.5, 3
    contexts = np.stack([device, rng.normal(0, 1, count).astype(np.float32)], axis=1)
    contexts[rng.random(count) < 0.1, 1] = np.nan
    return replace(impressions, labels=labels, contexts=contexts, truth=None)


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(1)
    dataset = toy_dataset(replace(SCHEMA, context=CONTEXT), num_impressions=4000)
    parts = ("train_impressions", "validation_impressions", "test_impressions")
    dataset = replace(dataset, **{name: _told(getattr(dataset, name), rng) for name in parts})
    return dataset, train_ranker(dataset, toy_embeddings(), scores=zero_scores, config=CONFIG)


def _clicks(trained, device):
    """Mean probability of a click of all test impressions, had they been on that device."""
    dataset, checkpoint = trained
    test = dataset.test_impressions
    contexts = np.full_like(test.contexts, np.nan)
    contexts[:, 0] = device
    asked = replace(test, contexts=contexts)
    trainer = RankerTrainer(
        dataset, toy_embeddings(), checkpoint.ranker, CONFIG, np.random.default_rng(0), lambda *_: None
    )
    trainer.start_from(checkpoint)
    states = states_of(dataset, asked, checkpoint.user_rates[asked.user_rows])
    lists, places = lists_from_impressions(asked, zero_scores, states)
    logits = torch.from_numpy(trainer.logits(lists).reshape(-1, len(TASKS))[places])
    return float(checkpoint.ranker.probabilities(logits)[:, 0].mean())


def test_what_the_context_tells_is_learned_and_absent_is_the_average(trained):
    phone, tv, absent = (_clicks(trained, device) for device in (1, 2, np.nan))
    assert phone == pytest.approx(0.7, abs=0.08)
    assert tv == pytest.approx(0.1, abs=0.08)
    assert absent == pytest.approx(0.4, abs=0.12)


def test_a_value_that_training_has_not_seen_is_no_extreme(trained):
    assert 0.1 < _clicks(trained, 0) < 0.7


def test_exposures_of_one_moment_with_other_contexts_are_other_lists(trained):
    dataset, checkpoint = trained
    few = dataset.test_impressions.at(np.arange(6))
    same = {
        name: np.full_like(getattr(few, name), getattr(few, name)[0])
        for name in ("user_rows", "times", "history_ends")
    }
    contexts = np.array([[1, np.nan], [2, np.nan], [1, np.nan], [2, 0], [2, np.nan], [1, np.nan]], np.float32)
    asked = replace(few, **same, contexts=contexts)
    states = states_of(dataset, asked, checkpoint.user_rates[asked.user_rows])
    lists, places = lists_from_impressions(asked, zero_scores, states, by_moment=True)
    of = places // lists.item_rows.shape[1]
    for one in range(of.max() + 1):
        assert len(np.unique(np.nan_to_num(contexts[of == one], nan=-1), axis=0)) == 1
    assert of.max() < 4, "equal contexts share lists"
    np.testing.assert_array_equal(lists.user_state[of, places % lists.item_rows.shape[1]], states.users)

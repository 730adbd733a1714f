"""Places of exposures: what they add is learned, and is no part of what is served."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_dataset import SCHEMA, TASKS, toy_dataset, toy_embeddings, zero_scores

from builders import metrics
from builders.data.places import NUM_PLACES, place_rates, places_of
from builders.ranker.checkpoint import open_ranker, save_ranker
from builders.ranker.config import TINY_TRAINING
from builders.ranker.lists import lists_from_impressions, states_of
from builders.ranker.model import TINY
from builders.ranker.positions import NUM_FACTS, PositionBias, place_facts, read_positions
from builders.ranker.refit import refit_ranker
from builders.ranker.trainer import RankerTrainer
from builders.ranker.training import train_ranker
from ensemble.schema import Task

CONFIG = replace(TINY_TRAINING, epochs=2, batch=256, tried_rows=())
LOOKS = np.array([np.nan, 0.0, -1.0, -2.0, -3.0])  # what places 1 to 4 do to the log odds of a click


def _placed(impressions, rng):
    """The same impressions with clicks that depend on the place alone; items with an even row are mostly
    shown first."""
    count = len(impressions.times)
    first = np.where(impressions.item_rows % 2 == 0, 1, 3)
    positions = np.where(rng.random(count) < 0.8, first, 4 - first) + rng.integers(0, 2, count)
    labels = np.full((count, 3), np.nan, np.float32)
    labels[:, 0] = rng.random(count) < 1 / (1 + np.exp(-LOOKS[positions]))
    clicked = labels[:, 0] == 1
    labels[clicked, 1] = rng.random(clicked.sum()) < 0.5
    labels[clicked, 2] = 3 + rng.normal(0, 0.5, clicked.sum())
    return replace(impressions, positions=positions, labels=labels, truth=None)


@pytest.fixture(scope="module")
def shop():
    rng, dataset = np.random.default_rng(3), toy_dataset(num_impressions=5000)
    parts = ("train_impressions", "validation_impressions", "test_impressions")
    return replace(dataset, **{name: _placed(getattr(dataset, name), rng) for name in parts})


@pytest.fixture(scope="module")
def checkpoint(shop):
    return train_ranker(shop, toy_embeddings(), scores=zero_scores, config=CONFIG)


def _served(shop, checkpoint, impressions):
    """Probabilities [E, T] that are served of the impressions' items."""
    trainer = RankerTrainer(
        shop, toy_embeddings(), checkpoint.ranker, CONFIG, np.random.default_rng(0), lambda done, text: None
    )
    trainer.start_from(checkpoint)
    states = states_of(shop, impressions, checkpoint.user_rates[impressions.user_rows])
    lists, places = lists_from_impressions(impressions, zero_scores, states)
    logits = trainer.logits(lists).reshape(-1, len(TASKS))[places]
    return checkpoint.ranker.probabilities(torch.from_numpy(logits)).detach().numpy()


def _gap(shop, checkpoint):
    """How much more often items that were mostly shown first are said to be clicked."""
    test = shop.test_impressions
    click = _served(shop, checkpoint, test)[:, 0]
    even = test.item_rows % 2 == 0
    return float(click[even].mean() - click[~even].mean())


def test_what_a_place_does_is_not_taken_for_the_items_merit(shop, checkpoint):
    parts = ("train_impressions", "validation_impressions")
    hidden = {
        name: replace(of := getattr(shop, name), positions=np.zeros_like(of.positions)) for name in parts
    }
    no_places = replace(shop, **hidden)
    blind = train_ranker(no_places, toy_embeddings(), scores=zero_scores, config=CONFIG)
    assert blind.positions is None
    assert _gap(no_places, blind) > 0.15
    assert abs(_gap(shop, checkpoint)) < 0.05


def test_values_at_their_places_tell_clicks_apart_and_both_are_calibrated(shop, checkpoint):
    test = shop.test_impressions
    served = _served(shop, checkpoint, test)
    states = states_of(shop, test, checkpoint.user_rates[test.user_rows])
    facts = place_facts(SCHEMA, states.users, states.candidates)
    placed = checkpoint.positions.apply(TASKS, served, test.positions, facts)
    clicks = test.labels[:, 0]
    best = metrics.auc(clicks, LOOKS[test.positions])
    assert metrics.auc(clicks, placed[:, 0]) > best - 0.02
    assert metrics.auc(clicks, served[:, 0]) < best - 0.1
    assert max(metrics.ece(clicks, one[:, 0]) for one in (served, placed)) < 0.05
    learned = checkpoint.positions.slope[0] * checkpoint.positions.learned[1:5, 0, 0]
    assert np.diff(learned) == pytest.approx([-1, -1, -1], abs=0.35)


def test_unknown_places_change_nothing_and_far_ones_share_theirs(checkpoint):
    values = np.array([[0.2, 0.5, 3.0], [0.9, 0.1, -1.0]], np.float32)
    unknown = checkpoint.positions.apply(TASKS, values, np.zeros(2, int), np.ones((2, NUM_FACTS)))
    np.testing.assert_array_equal(unknown, values)
    assert places_of(np.array([0, 1, 32, 33, 64, 10**9])).tolist() == [0, 1, 32, 33, 37, NUM_PLACES - 1]
    assert (np.diff(places_of(np.arange(100_000)).astype(int)) >= 0).all()


def test_places_are_saved_with_the_ranker_and_a_refit_goes_on_from_them(shop, checkpoint, tmp_path):
    save_ranker(checkpoint, tmp_path, TINY)
    opened = open_ranker(tmp_path, SCHEMA)
    for name, array in vars(checkpoint.positions).items():
        np.testing.assert_array_equal(getattr(opened.positions, name), array)
    known = len(shop.train_impressions.times)
    whole = replace(
        shop,
        train_impressions=type(shop.train_impressions)(
            *(
                np.concatenate(
                    [getattr(part, name) for part in (shop.train_impressions, shop.test_impressions)]
                )
                for name in ("user_rows", "item_rows", "times", "history_ends", "labels", "positions")
            )
        ),
    )
    refitted = refit_ranker(whole, toy_embeddings(), opened, known, config=CONFIG, progress=lambda *_: None)
    assert not np.array_equal(refitted.positions.learned, opened.positions.learned)
    np.testing.assert_allclose(
        refitted.positions.learned[1:5, 0, 0], opened.positions.learned[1:5, 0, 0], atol=0.5
    )
    assert abs(_gap(shop, refitted)) < 0.05


def test_without_places_nothing_is_written(tmp_path):
    assert read_positions(tmp_path) is None


def test_place_rates_are_smoothed_and_only_of_events(rng):
    places, labels = np.array([1, 1, 2, 0]), np.array([[1.0, 5], [0, 5], [0, 5], [1, 5]], np.float32)
    rates = place_rates((Task("click", "binary"), Task("dwell", "regression")), places, labels)
    assert rates[1:3, 0] == pytest.approx([(1 + 10) / 32, 10 / 31])
    assert np.isnan(rates[0]).all()
    assert np.isnan(rates[:, 1]).all()


def test_the_facts_tell_what_was_met_how_long_ago_and_by_whom(shop):
    test = shop.test_impressions
    states = states_of(shop, test, np.zeros((len(test.times), SCHEMA.sizes.user_rates), np.float32))
    facts = place_facts(SCHEMA, states.users, states.candidates)
    for row in range(0, len(test.times), 97):
        start = shop.histories.offsets[test.user_rows[row]]
        past = shop.histories.item_rows[start : test.history_ends[row]].tolist()
        item = test.item_rows[row]
        ago = past[::-1].index(item) + 1 if item in past else 0
        assert facts[row] == pytest.approx(
            [1.0, float(ago > 0), 1 / ago if ago else 0.0, float(not past)], abs=1e-3
        )


def test_training_begins_with_places_that_matter_less_for_what_the_user_has_met(rng):
    count = 40_000
    positions, met = rng.integers(1, 5, count), rng.random(count) < 0.3
    odds = np.where(met, 1.0, LOOKS[positions])
    labels = (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(np.float32)[:, None]
    facts = np.stack([np.ones(count), met, met / 2, np.zeros(count)], axis=1).astype(np.float32)
    bias = PositionBias(1)
    bias.start((Task("click", "binary"),), places_of(positions), facts, labels)
    asked = torch.tensor([[1, 2, 3, 4, 0]], dtype=torch.uint8)
    of_others = bias(asked, torch.tensor([1.0, 0, 0, 0]).expand(1, 5, 4))[0, :, 0].tolist()
    of_met = bias(asked, torch.tensor([1.0, 1, 0.5, 0]).expand(1, 5, 4))[0, :, 0].tolist()
    assert np.diff(of_others[:4]) == pytest.approx([-1, -1, -1], abs=0.15)
    assert np.diff(of_met[:4]) == pytest.approx([0, 0, 0], abs=0.15)
    assert of_others[4] == of_met[4] == 0

"""What a shop chose to show is told from what its users chose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_dataset import toy_dataset

from builders.data.dataset import Impressions
from builders.ranker.propensities import exposure_weights, shows_lists

OFTEN, SELDOM = 0.5, 0.05  # the chances of each half of the items to be shown to a user


@pytest.fixture(scope="module")
def choosy():
    """A shop that shows the first half of its items ten times as often; users like both alike."""
    dataset, rng = toy_dataset(num_impressions=100), np.random.default_rng(0)
    half = dataset.num_items // 2

    def shown(times: int) -> Impressions:
        chance = np.where(np.arange(1, dataset.num_items + 1) <= half, OFTEN, SELDOM)
        _, users, items = np.nonzero(rng.random((times, dataset.num_users, dataset.num_items)) < chance)
        count, clicked = len(users), rng.random(len(users)) < 0.3
        labels = np.full((count, 3), np.nan, np.float32)
        labels[:, 0] = clicked
        zeros = np.zeros(count, np.int64)
        return Impressions(users + 1, items + 1, np.arange(count), zeros, labels, zeros)

    return replace(dataset, train_impressions=shown(20), validation_impressions=shown(1))


def test_a_next_item_counts_by_how_seldom_it_is_shown(choosy):
    shown = choosy.validation_impressions
    clicks = shown.labels[:, 0] == 1
    users, true = shown.user_rows[clicks], shown.item_rows[clicks]
    items = np.tile(np.arange(1, choosy.num_items + 1), (len(users), 1))
    scores = np.zeros((*items.shape, 3), np.float32)
    weights = exposure_weights(choosy, users, items, scores, items == true[:, None])
    seldom = true > choosy.num_items // 2
    assert weights.mean() == pytest.approx(1)
    assert seldom.mean() < 0.2, "the shop hides them"
    assert np.average(seldom, weights=weights) == pytest.approx(0.5, abs=0.12), "users do not"
    # what was not recalled counts 1, and padding changes nothing
    wide = np.concatenate([items, np.full((len(users), 4), -1)], axis=1)
    is_true = wide == true[:, None]
    is_true[0] = False
    padded = exposure_weights(choosy, users, wide, np.zeros((*wide.shape, 3), np.float32), is_true)
    assert padded[0] == 1
    np.testing.assert_allclose(padded[1:] / padded[1], weights[1:] / weights[1], rtol=0.02)


def test_a_shop_whose_exposures_are_events_of_its_users_has_nothing_to_correct(choosy):
    assert shows_lists(choosy)
    owners = np.repeat(np.arange(choosy.num_users + 1), np.diff(choosy.histories.offsets))
    items = choosy.histories.item_rows
    labels = np.zeros((len(owners), 3), np.float32)
    zeros = np.zeros(len(owners), np.int64)
    views = Impressions(owners, items, zeros, zeros, labels, zeros)
    assert not shows_lists(replace(choosy, validation_impressions=views))
    assert not shows_lists(replace(choosy, train_impressions=None, validation_impressions=None))


def test_where_all_or_nothing_was_shown_every_list_counts_one(choosy):
    users = np.array([1, 2])
    items = np.array([[1, -1], [2, -1]])
    weights = exposure_weights(choosy, users, items, np.zeros((2, 2, 3)), np.zeros((2, 2), bool))
    assert weights.tolist() == [1, 1]

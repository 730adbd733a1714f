"""Rates of users, items and their groups: what was known before each row, and never the row's own label."""

from dataclasses import replace

import numpy as np
import pytest

from builders.data.dataset import Impressions
from builders.data.rates import _STRENGTHS, moments_of, rates_of, with_rates
from ensemble.schema import Feature, Schema, Sizes, Table, Task

TASKS = (Task("click", "binary"), Task("buy", "binary", "click"), Task("dwell", "regression", "click"))
SCHEMA = with_rates(
    Schema("toy", Table((Feature("brand", "category", 0, 1, 1, 5),)), Table(), TASKS, Sizes())
)


class Shop:
    """The parts of a dataset that rates are counted from."""

    num_items, num_users = 6, 5

    def __init__(self, schema=SCHEMA):
        self.schema = schema
        self.item_codes = np.array([[0], [1], [1], [2], [2], [3], [3]], np.int32)


def _impressions(rng, count=400):
    users, items = rng.integers(1, 6, count), rng.integers(1, 7, count)
    times = np.sort(rng.integers(1_700_000_000, 1_700_000_200, count))  # many at the same second
    labels = np.full((count, 3), np.nan, np.float32)
    labels[:, 0] = rng.random(count) < 0.3 + 0.1 * (items == 2)
    clicked = labels[:, 0] == 1
    labels[clicked, 1] = rng.random(clicked.sum()) < 0.5
    labels[clicked, 2] = rng.normal(3, 1, clicked.sum())
    known = times[:, None] + rng.integers(0, 50, (count, 3)) * (labels > 0)
    known[:, 1:] = np.maximum(known[:, 1:], known[:, :1])
    ends = np.zeros(count, np.int64)
    return Impressions(users, items, times, ends, labels, ends, None, known_times=known)


def test_a_row_knows_what_had_been_shown_and_had_happened_some_time_before_it_and_nothing_else(rng):
    shop, shown = Shop(), _impressions(rng)
    rates = rates_of(shop, shown, 0.1)
    prior = shown.labels[:, 0].mean()
    asked = moments_of(shown.times, 0.1, has_clock=True)
    for row in (0, 57, 200, 399):
        before = (shown.item_rows == shown.item_rows[row]) & (shown.times < asked[row])
        came = before & (shown.known_times[:, 0] < asked[row])
        positive = float((shown.labels[came, 0] == 1).sum())
        fits = [
            np.log((s := (positive + m * prior) / (before.sum() + m)) / (1 - s)) - np.log(prior / (1 - prior))
            for m in _STRENGTHS
        ]
        found = rates.of_rows[0][row]
        assert np.abs(np.array(fits) - found[0]).min() < 1e-4
        assert found[-1] == pytest.approx(np.log1p(before.sum()), rel=1e-6)
    assert rates.priors[0] == pytest.approx(np.log(prior / (1 - prior)), rel=1e-5)
    assert not rates.items[0].any()
    assert not rates.users[0].any()


def test_rates_of_training_are_as_old_as_those_that_are_served():
    times = 1_700_000_000 + np.concatenate([np.arange(5_000) * 1_000, 5_000_000 + np.arange(5_000)])  # a sale
    asked = np.searchsorted(times, moments_of(times, 0.1, has_clock=True))
    back = np.arange(10_000) - asked
    assert (back.min(), back[5_000:].max()) == (0, pytest.approx(999, abs=2)), (
        "by rows, whatever the clock says"
    )
    assert back[1_000:].mean() == pytest.approx(500, rel=0.05)
    assert (moments_of(times, 0.1, has_clock=False) == times).all()
    assert (moments_of(times, 0.0, has_clock=True) == times).all()


@pytest.mark.parametrize("has_clock", [True, False])
def test_a_rows_own_label_is_not_in_its_own_rates(rng, has_clock):
    shop, shown = Shop(replace(SCHEMA, has_clock=has_clock)), _impressions(rng)
    first = rates_of(shop, shown, 0.0)
    row = 200
    labels = shown.labels.copy()
    labels[row, 0] = 1 - labels[row, 0]
    labels[row, 1:] = np.nan if labels[row, 0] == 0 else 1.0
    # compare orders of rows: a changed label moves the prior of all alike
    second = rates_of(shop, replace(shown, labels=labels), 0.0)
    own, other = first.of_rows[0][:, 0], second.of_rows[0][:, 0]
    same = (shown.item_rows == shown.item_rows[row]) & (shown.times == shown.times[row])
    if has_clock:
        assert np.abs(own[same] - other[same]).max() < 0.1
    else:
        assert abs(own[row] - other[row]) < 0.1
    assert first.items[shown.item_rows[row], 0] != second.items[shown.item_rows[row], 0]


def test_groups_share_their_rates_and_a_new_item_of_a_group_has_them(rng):
    shop, shown = Shop(), _impressions(rng)
    rates = rates_of(shop, shown, 0.0)
    assert rates.codes[1:4].any(axis=1).all(), "each brand has its own"
    assert (rates.codes[1] != rates.codes[2]).any()
    brand = shown.labels[np.isin(shown.item_rows, (1, 2)), 0].mean()
    assert (rates.codes[1, 0] > 0) == (brand > shown.labels[:, 0].mean())
    assert not rates.items[:, 3:6].any(), "they come by the item's codes, so that new items have them too"


def test_labels_that_tell_nothing_give_rates_of_nothing():
    rng = np.random.default_rng(0)
    shop, shown = Shop(), _impressions(rng, 5000)
    labels = shown.labels.copy()
    labels[:, 0] = rng.random(5000) < 0.3
    rates = rates_of(shop, replace(shown, labels=labels, known_times=None), 0.0)
    assert np.abs(rates.of_rows[0][1000:, 0]).max() < 0.5


def test_an_exposure_at_the_end_of_a_list_counts_less_against_its_item(rng):
    count, looks = 40_000, np.array([0.0, 0.4, 0.1])
    items = rng.integers(1, 3, count)  # item 1 is mostly shown first, item 2 last; both are as good
    positions = np.where(rng.random(count) < 0.9, items, 3 - items)
    labels = np.full((count, 3), np.nan, np.float32)
    labels[:, 0] = rng.random(count) < looks[positions]
    clicked = labels[:, 0] == 1
    labels[clicked, 1], labels[clicked, 2] = 1, 2
    times, none = np.arange(count), np.zeros(count, np.int64)
    shown = Impressions(np.ones(count, np.int64), items, times, none, labels, positions)
    found, blind = (
        rates_of(Shop(), one, 0.0).items[1:3, 0] for one in (shown, replace(shown, positions=none))
    )
    assert np.abs(found).max() < 0.1
    assert blind[0] - blind[1] > 1

"""Off-policy estimators find a known truth from a log of another policy, and say when a log cannot tell."""

import numpy as np
import pyarrow.csv as csv
import pytest
from real_data import real_data

from builders.verify.off_policy import (
    doubly_robust,
    examination,
    ips,
    moved,
    replay,
    snips,
    weights_of,
)
from ensemble.errors import InvalidInput

_RATES = np.array(
    [[0.1, 0.5, 0.2, 0.7], [0.6, 0.1, 0.3, 0.2], [0.3, 0.3, 0.8, 0.1]]
)  # of 3 contexts, 4 items
_LOGGED = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
_TARGET = np.array([[0.1, 0.1, 0.1, 0.7], [0.7, 0.1, 0.1, 0.1], [0.0, 0.1, 0.8, 0.1]])
_TRUTH = float((_TARGET * _RATES).sum(1).mean())


def _log(rng, count=600):
    """A log: contexts, items, rewards, and the weight of each exposure."""
    context = rng.integers(0, 3, count)
    item = (rng.random(count)[:, None] > np.cumsum(_LOGGED[context], axis=1)).sum(1)
    reward = (rng.random(count) < _RATES[context, item]).astype(float)
    return context, item, reward, weights_of(_TARGET[context, item], _LOGGED[context, item])


def _all(rng, guess=_RATES, repeats=40):
    """Estimates of many logs, by method: values, and whether the interval held the truth."""
    found = {"ips": [], "snips": [], "dr": []}
    for _ in range(repeats):
        context, item, reward, weight = _log(rng)
        users = np.arange(len(reward))
        expected = (_TARGET * guess).sum(1)[context]
        found["ips"].append(ips(reward, weight, users))
        found["snips"].append(snips(reward, weight, users))
        found["dr"].append(doubly_robust(reward, weight, guess[context, item], expected, users))
    return found


def test_all_find_the_worth_of_another_policy_and_their_intervals_hold_it(rng):
    found = _all(rng)
    spread = {}
    for name, of in found.items():
        values = np.array([one.value for one in of])
        spread[name] = values.std()
        assert abs(values.mean() - _TRUTH) < 4 * spread[name] / np.sqrt(len(of)), name
        assert sum(one.low <= _TRUTH <= one.high for one in of) >= 0.85 * len(of), name
    assert spread["dr"] < spread["snips"] < spread["ips"]
    logged = float((_LOGGED * _RATES).sum(1).mean())
    assert _TRUTH - logged > 0.2  # what the log itself was worth is another number


def test_doubly_robust_survives_a_wrong_model_or_wrong_propensities_but_not_both(rng):
    wrong = np.full_like(_RATES, 0.9)
    values = [one.value for one in _all(rng, wrong, repeats=20)["dr"]]
    assert abs(np.mean(values) - _TRUTH) < 4 * np.std(values) / np.sqrt(20)
    context, item, reward, _ = _log(rng, 20_000)
    users, uniform = np.arange(20_000), np.full(20_000, 0.25)
    off = weights_of(_TARGET[context, item], uniform)
    expected = (_TARGET * _RATES).sum(1)[context]
    right = doubly_robust(reward, off, _RATES[context, item], expected, users)
    assert right.value == pytest.approx(_TRUTH, abs=0.02)
    assert abs(ips(reward, off, users).value - _TRUTH) > 0.05
    both = doubly_robust(reward, off, wrong[context, item], (_TARGET * wrong).sum(1)[context], users)
    assert abs(both.value - _TRUTH) > 0.03


def test_replay_of_a_uniform_log_is_the_mean_where_both_agree(rng):
    context, item = rng.integers(0, 3, 30_000), rng.integers(0, 4, 30_000)
    reward = (rng.random(30_000) < _RATES[context, item]).astype(float)
    best = _RATES.argmax(1)
    found = replay(reward, item == best[context], np.arange(30_000))
    assert found.low < _RATES.max(1).mean() < found.high
    assert found.value == pytest.approx(reward[item == best[context]].mean())
    assert found.effective_rows == (item == best[context]).sum()


def test_an_interval_is_of_users_not_of_rows(rng):
    reward = np.repeat((rng.random(40) < 0.5).astype(float), 100)
    weight = np.ones(4000)
    of_users = ips(reward, weight, np.repeat(np.arange(40), 100))
    of_rows = ips(reward, weight, np.arange(4000))
    assert of_users.high - of_users.low > 5 * (of_rows.high - of_rows.low)


def test_one_heavy_exposure_is_no_evidence(rng):
    weights = np.full(5000, 0.01)
    weights[7] = 400.0
    found = snips((rng.random(5000) < 0.1).astype(float), weights, np.arange(5000))
    assert found.effective_rows < 2
    assert not found.tells
    assert weights_of(np.array([1.0]), np.array([0.001]), most=10.0).tolist() == [10.0]


def test_places_are_learned_apart_from_what_stands_in_them(rng):
    looks, appeal = np.array([1.0, 0.6, 0.4, 0.2]), rng.random(30) * 0.5
    item = rng.integers(0, 30, 200_000)
    # good items stand higher: place and appeal must be told apart
    position = 1 + np.minimum(3, (rng.random(200_000) * 4 * (1.4 - 1.6 * appeal[item])).astype(int).clip(0))
    clicks = (rng.random(200_000) < looks[position - 1] * appeal[item]).astype(float)
    found = examination(item, position, clicks)
    assert found == pytest.approx(looks, abs=0.03)
    raw = np.array([clicks[position == place].mean() for place in (1, 2, 3, 4)])
    assert abs(raw[3] / raw[0] - looks[3]) > 0.05


def test_another_order_of_the_same_lists_is_worth_what_its_places_give(rng):
    looks, appeal = np.array([1.0, 0.5, 0.25]), np.array([0.1, 0.3, 0.8])
    order = np.argsort(rng.random((30_000, 3)), axis=1)
    positions = np.empty_like(order)
    np.put_along_axis(positions, order, np.tile([1, 2, 3], (30_000, 1)), axis=1)
    clicks = (rng.random((30_000, 3)) < looks[positions - 1] * appeal).astype(float)
    best_first = np.tile([3, 2, 1], (30_000, 1))
    users = np.repeat(np.arange(30_000), 3)
    found = moved(clicks.ravel(), positions.ravel(), best_first.ravel(), looks, users)
    truth = float((looks[best_first[0] - 1] * appeal).mean())
    assert found.low < truth < found.high
    assert clicks.mean() < 0.9 * truth


@pytest.mark.parametrize(
    ("target", "propensity", "message"),
    [
        (0.5, 0.0, "propensity of exposure 2 is 0.0; wanted a chance above 0 and at most 1"),
        (0.5, np.nan, "propensity of exposure 2 is nan"),
        (1.5, 0.5, "target of exposure 2 is 1.5; wanted a chance from 0 to 1"),
    ],
)
def test_what_is_no_chance_is_refused(target, propensity, message):
    with pytest.raises(InvalidInput) as error:
        weights_of(np.array([0.5, target]), np.array([0.5, propensity]))
    assert message in str(error.value)


def test_an_empty_log_tells_nothing():
    none = np.zeros(0)
    found = snips(none, none, none.astype(int))
    assert np.isnan(found.value)
    assert not found.tells


def _obd(policy, campaign):
    path = real_data("log_obd_small") / "log_obd_small" / f"{policy}_{campaign}.csv.gz"
    table = csv.read_csv(path)
    names = ("item_id", "position", "click", "propensity_score")
    return [table[name].to_numpy() for name in names]


@pytest.mark.parametrize(("campaign", "items"), [("men", 34), ("women", 46)])
def test_a_random_log_tells_what_a_bandit_was_worth(campaign, items):
    """Its source publishes no estimates for these files: the bandit's own log says what it was worth."""
    item, position, click, chance = _obd("random", campaign)
    shown, places, own, _ = _obd("bts", campaign)
    counts = np.bincount(shown * 3 + places - 1, minlength=3 * items).reshape(items, 3)
    weights = weights_of((counts / counts.sum(0))[item, position - 1], chance)
    assert chance == pytest.approx(1 / items)
    assert weights.mean() == pytest.approx(1, abs=0.03)
    for found in (ips(click, weights, np.arange(len(click))), snips(click, weights, np.arange(len(click)))):
        assert found.tells
        assert found.low < own.mean() < found.high
        assert found.value == pytest.approx(own.mean(), rel=0.35)


def test_a_bandits_log_tells_what_showing_at_random_is_worth_or_that_it_cannot():
    for campaign, items, tells in (("men", 34, True), ("women", 46, False)):
        _, _, click, chance = _obd("bts", campaign)
        found = snips(click, weights_of(np.full(len(click), 1 / items), chance), np.arange(len(click)))
        assert found.tells == tells
        if tells:
            assert found.low < _obd("random", campaign)[2].mean() < found.high

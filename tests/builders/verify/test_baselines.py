"""Baselines see the past alone, are as good as their definitions, and what is below them is said."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from builders.data.dataset import Dataset, Histories, Impressions, Targets
from builders.verify import baselines
from builders.verify.baselines import (
    baseline_lines,
    first_places,
    ranking_baselines,
    shortfalls,
    task_baselines,
)
from builders.verify.plain_features import joined, plain_features, sums_before
from ensemble.schema import Feature, Schema, Table, Task

_USERS, _ITEMS = 60, 40
_AVERAGES = np.array([0.3, 0.2, 1.0])


def _impressions(rng, count, start, histories):
    users, items = rng.integers(1, _USERS + 1, count), rng.integers(1, _ITEMS + 1, count)
    times = np.sort(rng.integers(start, start + 5000, count))
    appeal = (items % 4) / 2 - 1.5 + (users % 3) / 2
    click = (rng.random(count) < 1 / (1 + np.exp(-appeal))).astype(np.float32)
    # what a buy depends on stands in a column and nowhere else
    buy = np.where(click == 1, rng.random(count) < np.where(items % 2, 0.8, 0.2), np.nan).astype(np.float32)
    hours = np.where(click == 1, items % 5 + rng.normal(size=count), np.nan).astype(np.float32)
    spans = [np.searchsorted(histories.times[a:b], t) + a for a, b, t in zip(
        histories.offsets[users], histories.offsets[users + 1], times, strict=True)]  # fmt: skip
    labels = np.stack([click, buy, hours], axis=1)
    return Impressions(users, items, times, np.array(spans), labels, rng.integers(0, 6, count))


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(1)
    counts = np.r_[0, rng.integers(0, 9, _USERS)]
    offsets = np.r_[0, np.cumsum(counts)]
    times = np.concatenate([np.sort(rng.integers(0, 20_000, n)) for n in counts])
    kinds = np.ones(offsets[-1], np.uint8)
    histories = Histories(offsets, rng.integers(1, _ITEMS + 1, offsets[-1]), times, kinds)
    parts = [_impressions(rng, count, at, histories) for count, at in ((3000, 0), (500, 5000), (800, 10_000))]
    tasks = (Task("click", "binary"), Task("buy", "binary", "click"), Task("hours", "regression", "click"))
    items = Table((Feature("odd", "category", 0, 1, 1, 3), Feature("price", "number", 0, 1)))
    none = Targets(*[np.zeros(0, np.int64)] * 3)
    codes = np.r_[0, 2 + np.arange(1, _ITEMS + 1) % 2][:, None].astype(np.int32)
    ids = [np.array([str(n).encode() for n in range(1, count + 1)]) for count in (_ITEMS, _USERS)]
    return Dataset(
        schema=Schema("small", items, Table(), tasks), item_ids=np.sort(ids[0]), user_ids=np.sort(ids[1]),
        item_titles=np.zeros(_ITEMS + 1, "S1"), item_codes=codes,
        item_values=rng.normal(size=(_ITEMS + 1, 1)).astype(np.float32),
        user_codes=np.zeros((_USERS + 1, 1), np.int32), user_values=np.zeros((_USERS + 1, 1), np.float32),
        vocabularies={}, histories=histories, train_ends=offsets[1:], validation=none, test=none,
        train_impressions=parts[0], validation_impressions=parts[1], test_impressions=parts[2],
        item_numbers=np.zeros((_ITEMS + 1, 1)), item_encoding=[], known_ends=offsets[1:], split={},
    )  # fmt: skip


def test_sums_are_of_strictly_earlier_rows_of_the_same_key(rng):
    keys, times = rng.integers(0, 5, 200), rng.integers(0, 30, 200)
    values, at_keys, at_times = rng.normal(size=(200, 2)), rng.integers(0, 6, 50), rng.integers(-1, 32, 50)
    found = sums_before(keys, times, values, at_keys, at_times)
    wanted = [
        values[(keys == key) & (times < time)].sum(0) for key, time in zip(at_keys, at_times, strict=True)
    ]
    assert np.allclose(found, wanted)


def test_a_label_is_in_the_features_of_later_rows_alone(dataset):
    every = joined((dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions))
    asked, place = np.arange(len(every.times)), 2000
    labels = every.labels.copy()
    labels[place, 0] = 1 - labels[place, 0]
    before = plain_features(dataset, every, asked, _AVERAGES)
    after = plain_features(dataset, replace(every, labels=labels), asked, _AVERAGES)
    changed = (before.values != after.values) & ~(np.isnan(before.values) & np.isnan(after.values))
    rows = np.flatnonzero(changed.any(1) | (before.rates != after.rates).any((1, 2)))
    same = (every.user_rows == every.user_rows[place]) | (every.item_rows == every.item_rows[place])
    assert rows.tolist() == np.flatnonzero(same & (every.times > every.times[place])).tolist()


def test_features_of_the_history_are_those_counted_by_hand(dataset):
    every, histories = dataset.test_impressions, dataset.histories
    plain = plain_features(dataset, every, np.arange(len(every.times)), _AVERAGES)
    of = dict(zip(plain.names, plain.values.T, strict=True))
    for row in range(0, 200, 7):
        user, item, time = every.user_rows[row], every.item_rows[row], every.times[row]
        own = slice(histories.offsets[user], every.history_ends[row])
        mine = histories.times[own][histories.item_rows[own] == item]
        assert of["history_length"][row] == own.stop - own.start
        assert of["taken_before"][row] == len(mine)
        assert np.array_equal(
            of["since_taken"][row], time - mine[-1] if len(mine) else np.nan, equal_nan=True
        )
        taken = (histories.item_rows == item) & (histories.times < time)
        assert of["item_taken"][row] == taken.sum()


def test_a_label_counts_when_it_has_come_in_not_when_its_row_was_shown(dataset):
    every = joined((dataset.train_impressions,))
    known = np.repeat(every.times[:, None], 3, axis=1) + np.array([700, 900, 900])
    late = replace(every, known_times=known)
    row = 2900
    plain = plain_features(dataset, late, np.array([row]), _AVERAGES)
    of = dict(zip(plain.names, plain.values[0].tolist(), strict=True))
    own, time = every.user_rows == every.user_rows[row], every.times[row]
    clicks = every.labels[:, 0]
    assert of["user_click_rows"] == (own & (every.times < time)).sum()
    assert of["user_click_labels"] == clicks[own & (every.times + 700 < time)].sum()
    assert of["user_click_labels"] < clicks[own & (every.times < time)].sum()
    # a buy's row is one where the click has happened, which is known when the click is
    assert of["user_buy_rows"] == (own & (every.times + 700 < time) & (clicks == 1)).sum()
    assert of["user_buy_labels"] == np.nansum(every.labels[own & (every.times + 900 < time), 1])
    censored = replace(late, labels=np.where(every.labels == 1, 0, every.labels), settled=every.labels)
    assert np.array_equal(plain_features(dataset, censored, np.array([row]), _AVERAGES).rates, plain.rates)


def test_an_items_place_in_its_list_is_told_where_lists_were_shown(dataset):
    every = replace(dataset.test_impressions, times=dataset.test_impressions.times // 5000)
    plain = plain_features(dataset, every, np.arange(len(every.times)), _AVERAGES)
    of = dict(zip(plain.names, plain.values.T, strict=True))
    for row in range(0, 800, 37):
        own = (every.user_rows == every.user_rows[row]) & (every.times == every.times[row])
        prices = dataset.item_values[every.item_rows, 0]
        assert of["list_length"][row] == own.sum()
        lower, same = (prices[own] < prices[row]).sum(), (prices[own] == prices[row]).sum()
        place = of["item_price_place"][row] * max(own.sum() - 1, 1)
        assert lower - 1e-4 <= place <= lower + same - 1 + 1e-4
    alone = plain_features(dataset, dataset.test_impressions, np.arange(5), _AVERAGES)
    assert "list_length" not in alone.names


def test_rates_are_those_of_the_rows_before_smoothed_towards_the_average(dataset):
    every = joined((dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions))
    row = len(every.times) - 1
    plain = plain_features(dataset, every, np.array([row]), _AVERAGES)
    for place, keys in enumerate((every.user_rows, every.item_rows)):
        past = (keys == keys[row]) & (every.times < every.times[row])
        labels = every.labels[past]
        shown, came = (~np.isnan(labels)).sum(0), np.nansum(labels, 0)
        assert plain.rates[0, :, place] == pytest.approx((came + 10 * _AVERAGES) / (shown + 10))


def test_baselines_find_what_their_kind_can_find(dataset):
    test = dataset.test_impressions
    coin = np.random.default_rng(2).random((len(test.times), 3))
    found = task_baselines(dataset, coin)
    click, buy, hours = (found["tasks"][name] for name in ("click", "buy", "hours"))
    assert click["ways"]["two_rates"]["value"] > 0.6
    assert abs(click["ways"]["model"]["value"] - 0.5) < 0.05
    assert buy["ways"]["boosting"]["value"] > 0.75  # a column tells
    assert hours["ways"]["boosting"]["value"] < hours["ways"]["model"]["value"]
    rows = ~np.isnan(test.labels[:, 1])
    assert buy["ways"]["model"]["value"] == pytest.approx(roc_auc_score(test.labels[rows, 1], coin[rows, 1]))
    assert buy["rows"] == rows.sum()
    for task in (click, buy, hours):
        for of in (*task["ways"].values(), *task["gain"].values()):
            assert of["low"] < of["value"] < of["high"]
        for gain in task["gain"].values():
            assert gain["high"] < 0
    assert len(shortfalls({**found, "ranking": {}})) == 6
    assert "hours: the ranker's RMSE" in "\n".join(shortfalls({**found, "ranking": {}}))


def test_what_knows_the_truth_is_below_nothing(dataset):
    test = dataset.test_impressions
    lists = replace(test, times=test.times // 1000 * 1000)
    labels = np.nan_to_num(test.labels) + 1e-3 * np.random.default_rng(4).random(test.labels.shape)
    found = {**task_baselines(replace(dataset, test_impressions=lists), labels), "ranking": {}}
    assert shortfalls(found) == []
    assert found["tasks"]["click"]["mrr"]["two_rates"] < 1
    assert found["tasks"]["click"]["mrr"]["model"] == 1
    assert "Nothing is below a baseline." in baseline_lines({"baselines": found, "shortfalls": []})


def test_where_places_are_logged_the_ranker_is_asked_with_them_too(dataset):
    labels = np.nan_to_num(dataset.test_impressions.labels)
    coin = np.random.default_rng(2).random(labels.shape)
    click = task_baselines(dataset, coin, labels)["tasks"]["click"]
    assert click["ways"]["model"]["value"] == 1
    assert click["ways"]["unplaced"]["value"] == pytest.approx(roc_auc_score(labels[:, 0], coin[:, 0]))
    assert click["gain"]["unplaced"]["low"] > 0


def test_boosting_learns_from_a_sample_and_says_so(dataset):
    found = task_baselines(dataset, np.zeros((800, 3)), sample_rows=1000)
    assert (found["boosting"]["rows"], found["boosting"]["of"]) == (1000, 3500)
    assert "learned from 1,000 of 3,500" in "\n".join(
        baseline_lines({"baselines": {**found, "ranking": {}}, "shortfalls": []})
    )


def test_a_task_of_one_class_has_no_figure_and_no_line(dataset):
    labels = dataset.train_impressions.labels.copy()
    test = dataset.test_impressions.labels.copy()
    test[:, 1], labels[:, 2] = np.where(np.isnan(test[:, 1]), np.nan, 1), np.nan
    changed = replace(
        dataset,
        train_impressions=replace(dataset.train_impressions, labels=labels),
        test_impressions=replace(dataset.test_impressions, labels=test),
    )
    found = task_baselines(changed, np.zeros((800, 3)))
    assert found["tasks"]["buy"]["ways"]["model"] == {"value": None, "low": None, "high": None}
    assert not any(line.startswith("buy") for line in shortfalls({**found, "ranking": {}}))


def test_the_first_positive_of_each_list_has_its_place_by_hand(rng):
    users, times = rng.integers(0, 6, 400), rng.integers(0, 12, 400)
    labels, values = (rng.random(400) < 0.2).astype(float), rng.integers(0, 5, 400) / 5
    wanted = []
    for user in range(6):
        for time in range(12):
            own = (users == user) & (times == time)
            if own.sum() > 1 and labels[own].any():
                score = values[own]
                places = [
                    1 + (score > s).sum() + ((score == s).sum() - 1) / 2 for s in score[labels[own] == 1]
                ]
                wanted.append(min(places))
    assert first_places(users, times, labels, values).tolist() == wanted


def test_lists_below_recall_or_popularity_are_named(rng):
    users = np.arange(300)
    good, bad = rng.integers(0, 10, 300).astype(float), np.full(300, np.inf)
    bad[:20] = 5
    found = ranking_baselines(users, {"chain": bad, "recall": good, "popularity": bad, "user_encoder": good})
    lines = shortfalls({"tasks": {}, "ranking": found})
    assert [line.partition(" is below")[0] for line in lines] == [
        f"next item: the served list's {figure}" for figure in ("HR@10 0.0667", "NDCG@10 0.0237")
    ]
    assert all("recall's own order" in line for line in lines)
    assert found["hr@10"]["ways"]["recall"]["value"] == 1
    assert ranking_baselines(users[:0], {}) == {}


def test_a_difference_that_may_be_chance_is_said_to_be(rng):
    users = np.arange(400)
    chain = rng.permutation(400).astype(float)
    recall = np.where(np.arange(400) == int(np.argmin(chain > 10)), 0, chain)
    [line] = [
        x
        for x in shortfalls(
            {"tasks": {}, "ranking": ranking_baselines(users, {"chain": chain + 0.0, "recall": recall})}
        )
        if "NDCG" in x
    ]
    assert line.endswith("(which may be chance)")


def test_without_scikit_learn_the_rates_are_asked_and_a_line_says_what_is_missing(dataset, monkeypatch):
    monkeypatch.setattr(baselines, "has_boosting", lambda: False)
    found = {**task_baselines(dataset, np.nan_to_num(dataset.test_impressions.labels)), "ranking": {}}
    assert set(found["tasks"]["click"]["ways"]) == {"model", "two_rates"}
    [line] = shortfalls(found)
    assert line == "boosting was not asked: scikit-learn is not installed; cure: pip install scikit-learn"

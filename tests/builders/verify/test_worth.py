"""What lists are worth, held against plain loops: by the planted truth, and by replay of what was logged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from builders.data.dataset import Impressions, open_dataset
from builders.export.verifier import Verifier
from builders.shop.truth import FILE, open_truth
from builders.verify.by_log import by_log, place_weights
from builders.verify.by_propensities import by_propensities
from builders.verify.by_truth import by_truth, planted
from builders.verify.markdown import headline, markdown, worth_shortfalls
from builders.verify.off_policy import examination
from builders.verify.stage import _rows
from builders.verify.values import PLACES, Worth, blended
from builders.verify.worth import worth_of
from ensemble.schema import Task

TASKS = (Task("ctr", "binary"), Task("cvr", "binary", "ctr"), Task("dwell", "regression", "ctr", 0.1))


@pytest.fixture(scope="module")
def stages(release_cache):
    folder = release_cache.folder("tiny") / "repository" / ".build" / "shop"
    return {
        name: max(folder.glob(f"{name}-*"), key=lambda one: one.stat().st_mtime)
        for name in ("data", "export")
    }


@pytest.fixture(scope="module")
def verifier(stages):
    return Verifier(open_dataset(stages["data"]), stages["export"])


@pytest.fixture(scope="module")
def worth(verifier, stages):
    found = by_truth(verifier, stages["data"] / FILE)
    assert isinstance(found, Worth)
    return found


def test_a_task_counts_as_often_as_what_it_is_given_happens():
    found = blended(TASKS, np.array([[0.5, 0.2, 4.0], [0.0, 0.9, 9.0]]))
    np.testing.assert_allclose(found, [[0.5 + 0.1 + 0.2, 0.5, 0.1, 2.0], [0, 0, 0, 0]])


def test_each_way_s_worth_is_the_mean_truth_of_its_ten_unseen_items(verifier, worth, stages):
    """Of some users, item by item, without a matrix."""
    truth, dataset = open_truth(stages["data"] / FILE), verifier.dataset
    users, items = truth.rows_of(dataset.user_ids, dataset.item_ids)
    popular = np.argsort(-verifier.popularity[1:], kind="stable") + 1
    for row in range(0, len(worth.users), 60):
        user, time = worth.users[row], worth.times[row]
        end = dataset.test.history_ends[dataset.test.user_rows == user]
        answer = verifier.answer(np.array([user]), end)
        had = set(answer.tensors["seen_rows"].ravel().tolist())
        value = {}
        for item in range(1, dataset.num_items + 1):
            of = truth.tasks(users[[user - 1]], np.array([time]), items[[item - 1]][None])[0, 0]
            value[item] = of[0] * (1 + of[1] + 0.1 * of[2])
        new = [item for item in value if item not in had]
        lists = {
            "chain": answer.shown[0, :PLACES],
            "recall": answer.recalled[0, :PLACES],
            "popularity": [item for item in popular.tolist() if item not in had][:PLACES],
            "random": new,
            "best": sorted(new, key=lambda item: -value[item])[:PLACES],
        }
        for way, shown in lists.items():
            wanted = np.mean([value[item] for item in shown])
            assert worth.values[way][row, 0] == pytest.approx(wanted, rel=1e-9), way
        assert worth.values["best"][row, 0] >= worth.values["knowable"][row, 0] - 1e-12


def test_the_report_says_what_is_gained_and_how_sure_that_is(worth, verifier):
    report = {"worth": worth.report(verifier.dataset.schema.tasks)}
    ways = {way: of["worth"] for way, of in report["worth"]["ways"].items()}
    assert ways["best"] > ways["knowable"] > ways["chain"] > ways["popularity"] > 0
    assert report["worth"]["ways"]["chain"]["ctr"] < 1
    gain = report["worth"]["chain_minus"]["popularity"]
    assert gain["mean"] == pytest.approx(ways["chain"] - ways["popularity"])
    assert gain["low"] < gain["mean"] < gain["high"]
    times = report["worth"]["chain_times"]["popularity"]
    assert times["low"] < times["value"] < times["high"]
    assert times["value"] == pytest.approx(ways["chain"] / ways["popularity"])
    text = headline(report)
    assert (
        f"worth {times['value']:.2f} times ({times['low']:.2f} to {times['high']:.2f}) a list of the" in text
    )
    assert f"{ways['chain'] / ways['best']:.0%} of the best possible list" in text


def test_a_simpler_way_that_is_surely_worth_more_is_named(worth, verifier):
    tasks = verifier.dataset.schema.tasks
    assert worth_shortfalls(worth.report(tasks)) == []
    turned = {**worth.values, "recall": worth.values["chain"], "chain": worth.values["recall"]}
    report = replace(worth, values=turned).report(tasks)
    chain, recall = (report["ways"][way]["worth"] for way in ("chain", "recall"))
    assert worth_shortfalls(report) == [
        f"what is shown is worth {chain:.4f} an item, below recall's own order, {recall:.4f}"
    ]
    assert worth_shortfalls({"kind": "next_items", "why": "the shop has no labels"}) == []


def test_held_out_rows_have_the_worth_of_their_users_lists(worth, verifier):
    dataset = verifier.dataset
    gains = np.arange(len(dataset.test.user_rows), dtype=float)
    half = replace(
        worth,
        users=worth.users[::2],
        values={way: of[::2] for way, of in worth.values.items()},
    )
    rows = _rows(dataset, dataset.test, gains, half)
    np.testing.assert_array_equal(rows["gain"], gains)
    np.testing.assert_allclose(rows["worth"][::2], worth.values["chain"][::2, 0], rtol=1e-6)
    assert np.isnan(rows["worth"][1::2]).all()
    replayed = _rows(
        dataset,
        dataset.test,
        gains,
        replace(half, kind="replay", items=np.zeros(len(half.users), int), times=worth.times[::2]),
    )
    more = replayed[len(gains) :]
    assert np.isnan(more["gain"]).all()
    assert (more["item"] == b"").all()
    assert more["user"].tolist() == dataset.user_ids[half.users - 1].tolist()


# --- replay


@pytest.fixture(scope="module")
def impressions(verifier):
    """The test impressions, put together to lists of the same second: three rows of a user each."""
    whole = verifier.dataset.test_impressions
    order = np.lexsort((whole.times, whole.user_rows))
    nth = np.arange(len(order)) - np.searchsorted(whole.user_rows[order], whole.user_rows[order])
    parts = {name: of[order] for name, of in vars(whole).items() if of is not None}
    first = np.arange(len(order)) - nth % 3
    return replace(whole, **{**parts, "times": parts["times"][first], "positions": nth % 3 + 1})


def test_replay_gives_each_way_what_became_of_its_first(verifier, impressions):
    worth = by_log(verifier, impressions)
    assert isinstance(worth, Worth)
    value = blended(TASKS, np.nan_to_num(impressions.labels))[:, 0]
    moments: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(impressions.user_rows.tolist(), impressions.times.tolist(), strict=True)):
        moments.setdefault(key, []).append(row)
    moments = {key: rows for key, rows in moments.items() if len(rows) > 1}
    assert list(zip(worth.users.tolist(), worth.times.tolist(), strict=True)) == list(moments)
    popularity = verifier.popularity[impressions.item_rows]
    for place, rows in enumerate(moments.values()):
        assert worth.values["random"][place, 0] == pytest.approx(value[rows].mean(), abs=1e-6)
        assert worth.values["logged"][place, 0] == pytest.approx(value[rows[0]], abs=1e-6)
        best = [row for row in rows if popularity[row] == popularity[rows].max()]
        assert worth.values["popularity"][place, 0] == pytest.approx(value[best].mean(), abs=1e-6)
    mean = {way: of[:, 0].mean() for way, of in worth.values.items()}
    assert mean["chain"] > 1.1 * mean["random"], "the ranker knows something of these clicks"
    assert worth.measure == "replay of lists: 1 ctr + 1 cvr + 0.1 dwell"
    text = headline({"worth": worth.report(TASKS)})
    assert text.startswith(f"Of items shown together at {len(moments):,} moments, those that this release")
    assert "what the shop had put first" in text


def test_lists_in_another_order_are_worth_what_the_position_based_model_says(rng):
    """Clicks drawn from appeal and place: what the log alone tells of the best order is what would come of
    it, though the log put the best items last."""
    moments, places, items = np.repeat(np.arange(20_000), 4), np.tile([1, 2, 3, 4], 20_000), 8
    looks, appeal = np.array([1.0, 0.6, 0.4, 0.3]), np.linspace(0.05, 0.6, items)
    lists = np.argsort(rng.random((20_000, items)) + 0.1 * np.arange(items), axis=1)[:, :4].ravel()
    clicks = rng.random(len(lists)) < appeal[lists] * looks[places - 1]
    learned = examination(lists, places, clicks)
    np.testing.assert_allclose(learned, looks, atol=0.03)
    scored = {"best": appeal[lists], "worst": -appeal[lists], "none": np.zeros(len(lists))}
    weights = place_weights(scored, places, moments, learned)
    for way, score in scored.items():
        order = np.argsort(-score.reshape(-1, 4), axis=1, kind="stable")
        look = np.empty(order.shape)
        np.put_along_axis(look, order, np.broadcast_to(looks, order.shape), axis=1)
        wanted = (appeal[lists].reshape(-1, 4) * (look if way != "none" else looks.mean())).mean()
        assert (weights[way] * clicks).mean() == pytest.approx(wanted, rel=0.03), way
    np.testing.assert_allclose(weights["none"], weights["random"])
    assert (weights["logged"] == 1).all()
    best, worst = ((weights[way] * clicks).mean() for way in ("best", "worst"))
    assert best > 1.25 * clicks.mean() > 1.4 * worst


def test_where_training_tells_how_much_places_are_looked_at_replay_is_corrected(verifier, impressions, rng):
    train = verifier.dataset.train_impressions
    looked = replace(train, positions=rng.integers(1, 4, len(train.times)))
    asked = object.__new__(Verifier)
    asked.__dict__.update(vars(verifier), dataset=replace(verifier.dataset, train_impressions=looked))
    worth = by_log(asked, impressions)
    assert worth.kind == "places"
    plain = by_log(verifier, impressions)
    mean = blended(TASKS, np.nan_to_num(impressions.labels))[:, 0]
    assert len(worth.users) == len(plain.users)
    assert worth.values["logged"][:, 0].mean() == pytest.approx(mean.mean(), rel=0.1)
    report = worth.report(TASKS)
    assert headline({"worth": report}).startswith(
        f"Put into this release's order, {len(worth.users):,} lists "
    )
    # Here places were drawn at random: they are looked at alike, and no order gains anything.
    assert report["chain_times"]["logged"]["value"] == pytest.approx(1, abs=0.1)


def test_a_moment_s_items_are_scored_by_what_was_known_at_its_first(verifier, impressions):
    """A click within the moment must not tell the ranker what came of the others."""
    changed = replace(impressions, history_ends=impressions.history_ends.copy())
    later = np.flatnonzero(impressions.positions > 1)
    changed.history_ends[later] += 3
    first, second = (by_log(verifier, of) for of in (impressions, changed))
    np.testing.assert_array_equal(first.values["chain"], second.values["chain"])


def test_without_positions_there_is_no_logged_order_and_censored_rows_are_left_out(verifier, impressions):
    none = replace(impressions, positions=np.zeros_like(impressions.positions))
    assert "logged" not in by_log(verifier, none).values
    labels = impressions.labels.copy()
    labels[impressions.positions == 3, 0] = np.nan
    worth = by_log(verifier, replace(none, labels=labels))
    pairs = by_log(verifier, replace(none, labels=impressions.labels))
    assert len(worth.users) == len(pairs.users)
    assert worth.values["random"][:, 0].mean() != pairs.values["random"][:, 0].mean()


def test_rows_of_one_item_make_sessions_and_too_few_users_no_worth(verifier):
    single = verifier.dataset.test_impressions
    few = replace(single, **{n: of[:20] for n, of in vars(single).items() if of is not None})
    assert by_log(verifier, few).startswith("fewer than 30 held-out users were shown several items")
    near = replace(single, times=single.times.min() + np.arange(len(single.times)) % 1000)
    assert by_log(verifier, near).measure.startswith("replay of sessions: ")


def test_a_shop_without_labels_is_said_to_have_next_items_only(verifier, tmp_path):
    dataset = replace(verifier.dataset, test_impressions=None)
    asked = object.__new__(Verifier)
    asked.__dict__.update(vars(verifier), dataset=dataset)
    assert worth_of(asked, tmp_path) == "the shop has no labels"
    way = {"hr@10": 0.25, "ndcg@10": 0.1}
    report = {
        "worth": {"kind": "next_items", "why": "the shop has no labels"},
        "ranking": {"users": 4, "ways": {"chain": way, "popularity": {**way, "hr@10": 0.125}}},
    }
    assert headline(report) == (
        "Of 100 held-out users, 25.0 find the item that they took next among the ten that this release "
        "shows, 12.5 among the ten most popular ones; what lists are worth cannot be told: the shop has no "
        "labels."
    )
    page = markdown(dataset, report)
    assert page.index("Of 100 held-out users") < page.index("## Ranking of 4 held-out next items")
    assert headline({}) == ""
    nothing = {"places": 10, "kind": "truth", "ways": {way: {"worth": 0.0} for way in ("chain", "best")}}
    times = dict.fromkeys(("popularity", "recall"), dict.fromkeys(("value", "low", "high")))
    assert "0% of the best" in headline({"worth": {**nothing, "chain_times": times}})


def test_a_truth_that_does_not_fit_is_not_used(verifier, stages):
    dataset = verifier.dataset
    asked = object.__new__(Verifier)
    strange = replace(dataset, item_ids=np.concatenate([dataset.item_ids[:-1], [b"new"]]))
    asked.__dict__.update(vars(verifier), dataset=strange)
    assert by_truth(asked, stages["data"] / FILE) == "the planted truth does not know 'new'"
    clockless = replace(dataset, schema=replace(dataset.schema, has_clock=False))
    assert "no clock but places in order" in str(planted(clockless, stages["data"] / FILE))


# --- by propensities


def test_propensities_tell_what_the_chain_would_have_been_worth(verifier, stages, rng):
    """Of a log that showed anything, with its chances, and rewards drawn from the planted truth."""
    dataset, truth = verifier.dataset, planted(verifier.dataset, stages["data"] / FILE)
    test = dataset.test
    users = np.repeat(np.arange(len(test.user_rows)), 150)
    chances = rng.dirichlet(np.ones(dataset.num_items) * 20)
    items = rng.choice(dataset.num_items, len(users), p=chances) + 1
    rows, ends = test.user_rows[users], test.history_ends[users]
    times = dataset.histories.times[ends]
    asked = truth.truth.tasks(truth.users[rows], times, truth.items[items - 1][:, None])[:, 0]
    clicked = rng.random(len(users)) < asked[:, 0]
    labels = np.where(clicked[:, None], asked, np.nan).astype(np.float32)
    labels[:, 0] = clicked
    labels[:, 1] = np.where(clicked, rng.random(len(users)) < asked[:, 1], np.nan)
    positions = rng.integers(0, PLACES + 1, len(users))
    log = Impressions(rows, items, times, ends, labels, positions, propensities=chances[items - 1])
    worth = by_propensities(verifier, log)
    assert isinstance(worth, Worth)
    report = worth.report(TASKS)
    answer = verifier.answer(test.user_rows, test.history_ends)
    agrees = answer.shown[users, np.maximum(positions, 1) - 1] == items
    counted = np.where(agrees, blended(TASKS, np.nan_to_num(labels))[:, 0] / chances[items - 1], 0)
    np.testing.assert_allclose(worth.values["chain"][:, 0], counted, rtol=1e-6)
    when = dataset.histories.times[test.history_ends]
    value = truth.worth(test.user_rows, when)[..., 0]
    at = np.take_along_axis(value, answer.shown[:, :PLACES] - 1, axis=1).mean(axis=0)
    expected = (at.sum() + at[0]) / (PLACES + 1)  # an unknown place is the first
    for name, found in report["estimates"].items():
        assert found["low"] < expected < found["high"], name
        assert found["effective_rows"] > 100
    assert report["estimates"]["ips"]["value"] == pytest.approx(report["ways"]["chain"]["worth"])
    assert report["ways"]["random"]["worth"] == pytest.approx(value.mean(), rel=0.1)
    assert report["ways"]["chain"]["worth"] > 1.5 * report["ways"]["random"]["worth"]
    assert headline({"worth": report}).startswith(
        f"By {len(worth.users):,} logged exposures, what this release"
    )


def test_a_log_of_other_items_tells_nothing_by_propensities(verifier, impressions):
    assert by_propensities(verifier, impressions) == ""
    worst = np.argmin(verifier.popularity[1:]) + 1
    rows = replace(
        impressions,
        item_rows=np.full_like(impressions.item_rows, worst),
        propensities=np.full(len(impressions.times), 0.5),
    )
    assert "this release would have shown too few: they tell as much as" in by_propensities(verifier, rows)
    unknown = replace(rows, propensities=np.full(len(rows.times), np.nan))
    assert by_propensities(verifier, unknown) == "no held-out exposure has a propensity"

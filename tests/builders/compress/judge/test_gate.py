"""The gate: it bites on a true loss, stays quiet without one, and its intervals hold what they promise
(simulation)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from builders import bootstrap as figures
from builders import metrics
from builders.compress.judge.gate import holm, verdict
from builders.compress.judge.judge import overlaps
from builders.compress.judge.measure import Measured, TaskOutcome, Timing
from builders.compress.recipe import Gate
from ensemble import bootstrap
from ensemble.errors import InvalidInput

USERS = 4000
FAST = Gate(samples=300)


def _lists(rng, ranks, items=500):
    """Lists of ten that show item 1 at its rank."""
    lists = rng.integers(2, items, (len(ranks), 10))
    shown = ranks < 10
    lists[shown, ranks[shown].astype(int)] = 1
    return lists


def _measured(rng, scores, *, slices=None, tasks=()):
    """A release by which each user's true item gets this logit among 50 others' noise: [Q] -> Measured."""
    ranks = np.floor(50 / (1 + np.exp(scores)))
    users = np.arange(1, len(ranks) + 1)
    return Measured(
        users, ranks, (ranks < 40).astype(float), _lists(rng, ranks), slices or {}, tasks, num_candidates=40
    )


def _pair(rng, drop=0.0, noise=0.05, users=USERS, **more):
    """Two releases that see the same taste through noise of their own (so neither is better by it); the
    second's is off by `drop`."""
    taste = rng.normal(0, 2, users)
    first, second = (taste + rng.normal(0, noise, users) for _ in range(2))
    return _measured(rng, first, **more), _measured(rng, second - drop, **more)


def _task(rng, users=400, each=30, *, damage=0.0, bias=0.0, kind="binary"):
    """One task's impressions before and after: the second sees the truth through more noise, or off by a
    bias."""
    owners = np.repeat(np.arange(users), each)
    logits = rng.normal(-2, 1, len(owners)) + rng.normal(0, 1, users)[owners]
    if kind == "regression":
        labels = logits + rng.normal(0, 1, len(owners))
        return [TaskOutcome("watch", kind, owners, labels, values) for values in (logits, logits + bias)]
    true = 1 / (1 + np.exp(-logits))
    labels = (rng.random(len(owners)) < true).astype(float)
    worse = 1 / (1 + np.exp(-(logits + damage * rng.normal(0, 1, len(owners)) + bias)))
    return [TaskOutcome("click", kind, owners, labels, values) for values in (true, worse)]


def _node(name, changed, precision="int8"):
    facts = {
        "model": "ranker",
        "runtime": "onnxruntime",
        "node": name,
        "op": "MatMul",
        "parameters": 8,
        "reason": "",
    }
    return {**facts, "precision": precision, "changed": changed, "loss": 0.0}


def _row(found, figure):
    return next(row for row in found.rows if row.figure == figure)


def test_an_identical_release_passes_with_no_loss(rng):
    one, _ = _pair(rng, tasks=tuple(_task(rng)[:1]), slices={"half": np.arange(USERS) < 2500})
    found = verdict(one, one, FAST, keeps_weights=True)
    assert found.ok
    assert {row.verdict for row in found.rows} == {"ok"}
    assert all(row.loss == row.low == row.high == 0 for row in found.rows)


def test_a_true_loss_fails_and_the_message_names_the_nodes_to_lift_worst_first(rng):
    found = verdict(*_pair(rng, drop=0.3), FAST)
    row = _row(found, "NDCG@10")
    assert (row.verdict, found.ok) == ("FAIL", False)
    assert FAST.ranking < row.low < row.loss < row.high
    with pytest.raises(InvalidInput) as error:
        found.require(
            [
                _node(*facts)
                for facts in (
                    ("small", 0.001),
                    ("worst", 0.2),
                    ("high", 0.5, "fp32"),
                    ("second", 0.1),
                    ("third", 0.05),
                )
            ]
        )
    message = str(error.value)
    assert "| NDCG@10 |" in message
    assert message.index("worst") < message.index("second") < message.index("third")
    assert "small" not in message
    assert "high" not in message
    assert 'pinned = {"worst" = "fp32", …}' in message


def test_a_loss_within_the_limit_passes(rng):
    one, other = _pair(rng, drop=0.02, noise=0.02, users=20_000)
    found = verdict(one, other, Gate(samples=300, ranking=0.05))
    row = _row(found, "NDCG@10")
    assert found.ok
    assert 0 < row.low < row.loss < 0.05
    found.require()


def test_a_loss_that_chance_could_explain_warns_but_passes(rng):
    for _ in range(50):
        found = verdict(*_pair(rng, drop=0.05, noise=1.0, users=300), FAST)
        row = _row(found, "NDCG@10")
        if row.loss > FAST.ranking and row.low < FAST.ranking:
            assert row.verdict == "WARN"
            return
    pytest.fail("no pair of 300 noisy users lost more than the limit by chance")


def test_false_alarms_without_a_loss_are_rare():
    """200 pairs of equally good releases: a row fails in 2.5% of them where the loss is the limit itself, in
    fewer where it is 0."""
    rng = np.random.default_rng(1)
    alarms = sum(not verdict(*_pair(rng, noise=0.5, users=600), Gate(samples=200)).ok for _ in range(200))
    assert alarms <= 15  # three rows a pair, 2.5% each


def test_the_interval_of_a_relative_loss_covers_the_truth():
    """95% of the intervals, give or take the simulation's own error, hold the loss of the whole
    population."""
    rng = np.random.default_rng(2)
    taste = rng.normal(0, 2, 200_000)
    gains = [
        metrics.gains(np.floor(50 / (1 + np.exp(t))), 10)
        for t in (taste, taste + rng.normal(-0.1, 0.5, len(taste)))
    ]
    true = 1 - gains[1].mean() / gains[0].mean()
    held = 0
    for _ in range(300):
        chosen = rng.integers(0, len(taste), 800)
        [spread] = bootstrap.spreads(
            [figures.relative_loss(*(g[chosen] for g in gains))],
            800,
            samples=300,
            seed=int(rng.integers(1 << 30)),
        )
        held += spread.low <= true <= spread.high
    assert 0.91 <= held / 300 <= 0.985


def test_each_resamples_auc_equals_brute_force_with_ties(rng):
    users, each = 30, 12
    group = np.repeat(np.arange(users), each)
    labels, values = (rng.random(users * each) < 0.3).astype(float), rng.integers(0, 7, users * each) / 7
    weights = rng.multinomial(users, [1 / users] * users, 20).astype(np.float32)
    found = figures.auc(labels, values, group, users)(weights)
    for weight, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(len(group)), weight[group].astype(int))
        assert value == pytest.approx(metrics.auc(labels[rows], values[rows]), abs=1e-9)


def test_figures_of_all_users_are_those_of_metrics(rng):
    before, after = _task(rng, damage=0.5, bias=0.2)
    found = verdict(*_with_tasks(rng, [before], [after]), FAST)
    for figure, of in (("AUC click", metrics.auc), ("ECE click", metrics.ece)):
        row = _row(found, figure)
        assert row.reference == pytest.approx(of(before.labels, before.values), abs=1e-9)
        assert row.candidate == pytest.approx(of(after.labels, after.values), abs=1e-9)


def _with_tasks(rng, before, after):
    one, _ = _pair(rng, users=500)
    return tuple(
        Measured(one.users, one.ranks, one.recalled, one.lists, {}, tuple(tasks), num_candidates=40)
        for tasks in (before, after)
    )


@pytest.mark.parametrize(
    ("change", "failing"), [({"damage": 0.6}, "AUC click"), ({"bias": 0.5}, "ECE click")]
)
def test_a_damaged_task_fails_in_the_figure_that_was_damaged(rng, change, failing):
    before, after = _task(rng, **change)
    found = verdict(*_with_tasks(rng, [before], [after]), FAST)
    assert (
        next(row.figure for row in found.rows if row.verdict == "FAIL" and "click" in row.figure) == failing
    )
    assert verdict(*_with_tasks(rng, [before], [before]), FAST).ok


def test_a_regression_is_gated_by_its_error(rng):
    before, after = _task(rng, kind="regression", bias=0.4)
    found = verdict(*_with_tasks(rng, [before], [after]), FAST)
    assert _row(found, "RMSE watch").verdict == "FAIL"
    assert _row(found, "RMSE watch").candidate == pytest.approx(metrics.rmse(after.labels, after.values))


def test_lists_that_move_fail_where_only_precision_changed(rng):
    one, _ = _pair(rng)
    lists = one.lists.copy()
    lists[: USERS // 5] = lists[: USERS // 5, :] + 1000
    moved = Measured(one.users, one.ranks, one.recalled, lists, {}, num_candidates=40)
    found = verdict(one, moved, FAST, keeps_weights=True)
    assert [row.figure for row in found.rows if row.verdict == "FAIL"] == ["top-10 overlap"]
    assert _row(found, "top-10 overlap").candidate == pytest.approx(0.8)
    assert verdict(one, moved, FAST, keeps_weights=False).ok


def test_overlap_counts_shown_items_only():
    assert overlaps(np.array([[3, 5, -1], [1, 2, 3]]), np.array([[5, 9, -1], [3, 2, 1]])).tolist() == [
        0.5,
        1.0,
    ]


def test_a_slice_that_suffers_fails_and_a_small_one_is_only_reported(rng):
    big, small = np.arange(USERS) < 2500, np.arange(USERS) >= USERS - 500
    one = _measured(rng, rng.normal(0, 2, USERS), slices={"big": big, "small": small})
    ranks = np.where(big | small, one.ranks + 3, one.ranks)
    worse = Measured(one.users, ranks, one.recalled, one.lists, one.slices, num_candidates=40)
    found = verdict(one, worse, Gate(samples=300, ranking=0.5))
    assert [(row.figure, row.users, row.verdict) for row in found.rows if row.figure in ("big", "small")] == [
        ("big", 2500, "FAIL"),
        ("small", 500, "reported"),
    ]


def test_a_slice_fails_among_many_others_even_with_few_resamples(rng):
    slices = {f"slice {i}": np.arange(USERS) % 16 == i for i in range(16)}
    one = _measured(rng, rng.normal(0, 2, USERS), slices=slices)
    worse = Measured(
        one.users,
        np.where(slices["slice 3"], one.ranks + 5, one.ranks),
        one.recalled,
        one.lists,
        slices,
        num_candidates=40,
    )
    found = verdict(one, worse, Gate(samples=200, ranking=0.5, slice_users=200))
    assert [row.figure for row in found.rows if row.verdict == "FAIL"] == ["slice 3"]


def test_holm_goes_from_the_smallest_and_stops_at_the_first_that_stands():
    assert holm([0.009, 0.5, 0.001, None], alpha=0.025) == [True, False, True, False]
    assert holm([0.013, 0.012], alpha=0.025) == [True, True]
    assert holm([0.013, 0.013], alpha=0.025) == [False, False]


def test_the_table_is_json_markdown_and_console_alike(rng):
    from rich.console import Console

    one, other = _pair(rng, drop=0.3, slices={"none": np.zeros(USERS, bool)})
    timed = Measured(
        **{**vars(other), "timings": (Timing("ranker", 8, 2.0, 1.0), Timing("ranker", 1, 0.5, 1.0))}
    )
    found = verdict(one, timed, FAST)
    facts = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (facts["ok"], facts["rows"][0]["verdict"], facts["timings"][0]["ratio"]) == (False, "FAIL", 2.0)
    assert "ranker at batch 8: 2.00 ms, slower than the 1.00 ms" in found.markdown()
    assert "batch 1:" not in found.markdown()
    console = Console(width=200, record=True)
    console.print(found.table())
    assert "NDCG@10" in console.export_text()


def test_releases_measured_on_different_users_are_refused(rng):
    one, _ = _pair(rng, users=100)
    other, _ = _pair(rng, users=101)
    with pytest.raises(InvalidInput, match="same held-out users"):
        verdict(one, other)

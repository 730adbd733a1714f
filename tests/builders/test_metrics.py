"""Metrics against brute force and known values."""

import numpy as np
import pytest

from builders import metrics


def _brute_auc(labels, scores):
    positive, negative = scores[labels == 1], scores[labels == 0]
    pairs = positive[:, None] - negative[None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def test_auc_equals_brute_force_with_ties_and_undefined_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(np.float32)
    scores = rng.integers(0, 9, 300).astype(np.float32)
    assert metrics.auc(labels, scores) == pytest.approx(_brute_auc(labels, scores), abs=1e-12)
    undefined = np.concatenate([labels, np.full(50, np.nan, np.float32)])
    assert metrics.auc(undefined, np.concatenate([scores, np.ones(50)])) == pytest.approx(
        _brute_auc(labels, scores), abs=1e-12
    )


def test_auc_is_half_for_equal_scores_and_nan_for_one_class():
    assert metrics.auc(np.array([0, 1, 1]), np.zeros(3)) == 0.5
    assert np.isnan(metrics.auc(np.ones(3), np.arange(3)))


def test_rmse_and_log_loss_leave_undefined_rows_out():
    assert metrics.rmse(np.array([1.0, np.nan, 3.0]), np.array([0.0, 9.0, 3.0])) == pytest.approx(
        np.sqrt(0.5)
    )
    assert metrics.log_loss(np.array([1.0, np.nan]), np.array([0.5, 0.0])) == pytest.approx(np.log(2))
    assert np.isnan(metrics.rmse(np.array([np.nan]), np.zeros(1)))


@pytest.mark.parametrize(("rows", "spread"), [(100, 0.3), (1246, 0.2), (20_000, 0.05)])
def test_what_right_probabilities_miss_on_few_rows_is_told(rng, rows, spread):
    foretold = np.clip(rng.normal(0.4, spread, rows), 0.01, 0.99)
    drawn = [metrics.ece((rng.random(rows) < foretold).astype(float), foretold) for _ in range(200)]
    told = metrics.ece_by_chance(np.zeros(rows), foretold)
    assert told == pytest.approx(np.mean(drawn), rel=0.1)
    assert metrics.ece_by_chance(np.r_[np.zeros(rows), np.nan], np.r_[foretold, 0.5]) == told


def test_ece_is_small_for_true_probabilities_and_their_bias_otherwise():
    rng = np.random.default_rng(0)
    probabilities = rng.beta(1, 20, 200_000)
    labels = (rng.random(200_000) < probabilities).astype(np.float32)
    assert metrics.ece(labels, probabilities) < 0.002
    assert metrics.ece(labels, probabilities + 0.1) == pytest.approx(0.1, abs=0.002)
    assert metrics.ece(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_ranks_and_what_follows_from_them():
    lists = np.array([[3, 5, 7], [3, 5, -1], [8, 9, 1]])
    ranks = metrics.ranks_from_lists(lists, np.array([3, 7, 1]))
    assert ranks.tolist() == [0, np.inf, 2]
    assert metrics.hit_rate(ranks, 2) == pytest.approx(1 / 3)
    assert metrics.recall_at(ranks, 3) == pytest.approx(2 / 3)
    assert metrics.ndcg(ranks, 10) == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert np.isnan(metrics.ndcg(np.zeros(0), 10))


def test_ranks_from_scores_count_ties_half():
    scores = np.array([[3.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert metrics.ranks_from_scores(scores, np.array([1, 3, -1])).tolist() == [2.0, 0.0, np.inf]

"""The generated shop is hard enough: who knows only what is popular stays well behind who knows the truth."""

from __future__ import annotations

import numpy as np
import pytest

from builders.metrics import auc

MARGIN = 0.05


@pytest.mark.parametrize(("seed", "plain"), [(0, True), (1, True), (1, False), (2, False)])
def test_popularity_stays_below_the_oracle(tmp_path, seed, plain):
    from builders.data.stage import load_dataset
    from builders.shop.generate import generate_shop

    generate_shop(
        tmp_path / "shop", users=2000, items=600, events=80_000, seed=seed, images=False, plain=plain
    )
    dataset = load_dataset(tmp_path / "shop")
    train, test = dataset.train_impressions, dataset.test_impressions
    for task, name in enumerate(("ctr", "cvr")):
        labels = test.labels[:, task]
        oracle = auc(labels, test.truth[:, task])
        known = ~np.isnan(train.labels[:, task])
        happened = np.bincount(
            train.item_rows[known], train.labels[known, task], minlength=dataset.num_items + 1
        )
        shown = np.bincount(train.item_rows[known], minlength=dataset.num_items + 1)
        for way, score in {"count": happened, "rate": (happened + 1) / (shown + 4)}.items():
            popular = auc(labels, score[test.item_rows].astype(np.float32))
            assert popular < oracle - MARGIN, (
                f"{name}: popularity by {way} has AUC {popular:.4f}, the oracle {oracle:.4f}"
            )
        assert oracle < 0.95, "and the truth is not written on the forehead"
        assert 0.02 < np.nanmean(labels) < 0.6


@pytest.mark.parametrize("plain", [True, False])
def test_the_truth_is_what_labels_are_drawn_from(tmp_path, plain):
    """Binned by true probability, the observed rates agree: the oracle is one."""
    from builders.data.stage import load_dataset
    from builders.shop.generate import generate_shop

    generate_shop(tmp_path / "shop", users=2000, items=600, events=80_000, seed=3, images=False, plain=plain)
    impressions = load_dataset(tmp_path / "shop").train_impressions
    for task in (0, 1):
        known = ~np.isnan(impressions.labels[:, task])
        labels, truth = impressions.labels[known, task], impressions.truth[known, task]
        bins = np.digitize(truth, np.quantile(truth, np.linspace(0.1, 0.9, 9)))
        for b in range(10):
            inside = bins == b
            error = np.sqrt(truth[inside].mean() * (1 - truth[inside].mean()) / inside.sum())
            assert abs(labels[inside].mean() - truth[inside].mean()) < 4.5 * error

"""Estimates how likely a shop was to show each candidate, so that its own choice is not taken for taste.

A shop that logs what it showed draws its held-out next items from its own lists: whoever repeats the shop
foretells them, and a ranker that puts first what the shop hid looks bad whatever it is worth. So a next item
counts by one over the chance that it was shown: what was clicked although it was shown seldom tells the most.

Sources: Schnabel et al. (ICML 2016) for inverse propensities of a recommender's log, fitted by a logistic
regression; Yang et al. (RecSys 2018) for held-out ranking; Ionides (2008) for cutting the largest weights;
weights are normalized by their sum (Swaminathan and Joachims, NeurIPS 2015).

Axes: L lists, N candidates, S recall sources.
"""

from __future__ import annotations

import numpy as np

from builders.data.dataset import Dataset
from ensemble.arrays import Array

_MOST_EXPOSURES = 20_000  # asked whether they are events of a past
_MOST_CANDIDATES = 200_000  # that the regression learns from
_CUT = 0.99  # quantile at which weights are cut


def binary_tasks(dataset: Dataset) -> list[int]:
    """Lists the places of the binary tasks; a shop may have numbers alone."""
    return [t for t, task in enumerate(dataset.schema.tasks) if task.kind == "binary"]


def shows_lists(dataset: Dataset) -> bool:
    """Says whether the shop logs what it showed in vain: exposures that are no events of a past. Where a view
    is both an exposure and an event, users chose it, and there is nothing to correct."""
    shown, binary = dataset.validation_impressions, binary_tasks(dataset)
    if shown is None or not binary:
        return False
    in_vain = np.flatnonzero(shown.labels[:, binary[0]] == 0)[:_MOST_EXPOSURES]
    events = dataset.histories
    owners = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets))
    known = np.isin(
        _pairs(shown.user_rows[in_vain], shown.item_rows[in_vain]),
        _pairs(owners, np.asarray(events.item_rows)),
    )
    return bool(len(in_vain)) and bool(known.mean() < 0.5)


def exposure_weights(
    dataset: Dataset, user_rows: Array, item_rows: Array, scores: Array, is_true: Array
) -> Array:
    """Gives what each list counts [L] float64: one over the chance that its true item was shown, 1 on
    average.

    user_rows [L], item_rows [L, N] (-1 padded) with recall's scores [L, N, S], is_true [L, N] bool. Lists
    whose true item was not recalled count 1.
    """
    shown, weights = dataset.validation_impressions, np.ones(len(item_rows))
    assert shown is not None
    there, recalled = item_rows > 0, is_true.any(axis=1)
    was_shown = np.isin(
        _pairs(user_rows[:, None], item_rows), _pairs(shown.user_rows, np.asarray(shown.item_rows))
    )
    facts = _facts(dataset, item_rows, scores)
    chances = _chances(facts[there], was_shown[there])
    if chances is None or not recalled.any():
        return weights
    of_all = np.ones(item_rows.shape)
    of_all[there] = chances
    inverse = 1 / of_all[recalled, is_true[recalled].argmax(axis=1)]
    inverse = np.minimum(inverse, np.quantile(inverse, _CUT))
    weights[recalled] = inverse / inverse.mean()
    return weights


def _facts(dataset: Dataset, item_rows: Array, scores: Array) -> Array:
    """Gives what a shop's choice may follow [L, N, S + 1]: recall's scores, and how often the item was
    shown."""
    shown = dataset.train_impressions
    assert shown is not None
    counts = np.bincount(np.asarray(shown.item_rows), minlength=dataset.num_items + 1)
    return np.concatenate([scores, np.log1p(counts[np.maximum(item_rows, 0)])[..., None]], axis=-1)


def _chances(facts: Array, was_shown: Array) -> Array | None:
    """Fits the chance [n] of having been shown by facts [n, F]; None where none or all were."""
    from sklearn.linear_model import LogisticRegression

    if was_shown.all() or not was_shown.any():
        return None
    facts = (facts - facts.mean(axis=0)) / np.maximum(facts.std(axis=0), 1e-9)
    some = np.random.default_rng(0).permutation(len(facts))[:_MOST_CANDIDATES]
    if was_shown[some].all() or not was_shown[some].any():
        return None
    fitted = LogisticRegression(max_iter=200).fit(facts[some], was_shown[some])
    chances: Array = np.maximum(fitted.predict_proba(facts)[:, 1], 1e-6)
    return chances


def _pairs(users: Array, items: Array) -> Array:
    """Gives one number for each user row and item row."""
    return (np.asarray(users, np.int64) << 32) + np.maximum(items, 0)

"""Measures what lists are worth by a log that has the chance with which each item was shown (worth.py).

A way shows an item at a place or it does not: an exposure counts where the way would have shown the same, by
one over the chance that was logged (off_policy.py).

Axes: E exposures, K places of a list, T tasks, W seen items.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from builders.data.dataset import Impressions
from builders.export.verifier import BATCH, Verifier
from builders.verify.by_log import censored
from builders.verify.by_truth import unseen
from builders.verify.off_policy import FEWEST_ROWS, doubly_robust, ips, snips, weights_of
from builders.verify.values import PLACES, Worth, blended, sampled, weights_text
from ensemble.arrays import Array

_ROWS = 50_000  # exposures that are asked about


def by_propensities(verifier: Verifier, impressions: Impressions) -> Worth | str:
    """Measures what each way would have shown, by inverse propensities; doubly robust estimates beside it.

    Says why not where the log tells too little; nothing where it has no chances.
    """
    if impressions.propensities is None:
        return ""
    tasks = verifier.dataset.schema.tasks
    known = np.isfinite(impressions.propensities) & ~censored(impressions.labels, tasks)
    rows = np.flatnonzero(known)
    shown = impressions.at(rows[sampled(len(rows), _ROWS)])
    if not len(shown.times):
        return "no held-out exposure has a propensity"
    values = blended(tasks, np.nan_to_num(shown.labels))
    assert shown.propensities is not None
    lists = _lists(verifier, shown)
    chosen = {way: _at_place(of, shown.positions) for way, of in lists.items()}
    weights = {
        way: weights_of((of == shown.item_rows).astype(np.float64), shown.propensities)
        for way, of in chosen.items()
    }
    effective = snips(values[:, 0], weights["chain"], shown.user_rows).effective_rows
    if effective < FEWEST_ROWS:
        return (
            f"of {len(shown.times):,} exposures with propensities this release would have shown too few: "
            f"they tell as much as {effective:.0f}, and {FEWEST_ROWS:.0f} are wanted"
        )
    found = {way: values * of[:, None] for way, of in weights.items()}
    chances = np.full(len(shown.times), 1 / verifier.dataset.num_items)
    found["random"] = values * weights_of(chances, shown.propensities)[:, None]
    found["logged"] = values
    estimates = _estimates(verifier, shown, values[:, 0], weights["chain"], chosen["chain"])
    measure = f"inverse propensities: {weights_text(tasks)}"
    none = np.zeros(len(shown.times), np.int64)
    return Worth("propensities", measure, shown.user_rows, none, shown.times, found, estimates)


def _lists(verifier: Verifier, shown: Impressions) -> dict[str, Array]:
    """Gives the list [E, K] of each way for each exposure's user as it was then, padded with -1."""
    keys = np.stack([shown.user_rows, shown.history_ends], axis=1)
    asked, of = np.unique(keys, axis=0, return_inverse=True)
    popular = np.argsort(-verifier.popularity[1:], kind="stable") + 1
    parts = []
    for start in range(0, len(asked), BATCH):
        answer = verifier.answer(*asked[start : start + BATCH].T)
        seen = answer.had
        parts.append(
            {
                "chain": answer.shown[:, :PLACES],
                "recall": answer.recalled[:, :PLACES],
                "popularity": unseen(popular[: PLACES + seen.shape[1]], seen),
            }
        )
    return {way: np.concatenate([part[way] for part in parts])[of.ravel()] for way in parts[0]}


def _at_place(lists: Array, positions: Array) -> Array:
    """Gives the item [E] that lists [E, K] have at positions [E]; -1 beyond the list.

    An unknown place (0) is taken for the first.
    """
    place = np.maximum(positions, 1) - 1
    inside = place < lists.shape[1]
    return np.where(inside, lists[np.arange(len(lists)), np.minimum(place, lists.shape[1] - 1)], -1)


def _estimates(
    verifier: Verifier, shown: Impressions, rewards: Array, weights: Array, chosen: Array
) -> dict[str, dict[str, float]]:
    """Gives the chain's worth by each estimator: rewards, weights [E], chosen [E] the items it would show."""
    tasks, users = verifier.dataset.schema.tasks, shown.user_rows

    def guessed(items: Array) -> Array:
        rows = replace(shown, item_rows=np.maximum(items, 1))
        return blended(tasks, verifier.impression_probabilities(rows))[:, 0] * (items > 0)

    found = {
        "ips": ips(rewards, weights, users),
        "snips": snips(rewards, weights, users),
        "doubly_robust": doubly_robust(rewards, weights, guessed(shown.item_rows), guessed(chosen), users),
    }
    return {name: vars(one) for name, one in found.items()}

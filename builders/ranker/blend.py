"""Fits how far recall's relevance counts beside the tasks (ensemble/steps/blend.py), on held-out behaviour.

The ranker learns from what was shown, but orders what recall offers, most of which nobody was shown: a click
that is likely once an item is seen says little of whether it would be wanted at all. So each power is asked
three things on validation rows, which neither encoders nor ranker have learned from: where each user's next
item comes in the list, where the next conversion comes (the last binary task), and how well the exposures of
each user are told apart. What is likely worse than recall's own order for next items or conversions, by more
than a little, is left out; of the rest the one that keeps the largest share of what could be had, summed over
the three, is taken.

Of a shop that logs what it showed, next items and conversions count by one over the chance that it showed
them (propensities.py). Weighed so they still lean to what it shows: only what is surely worse is left out
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from builders import metrics
from builders.data.dataset import Dataset, Targets
from builders.data.splits import first_few_of_users, num_taken
from builders.index.offline import CandidateFunction, ScoreFunction
from builders.ranker import calibrate
from builders.ranker.lists import Lists, lists_from_impressions, lists_from_targets, states_of
from builders.ranker.propensities import binary_tasks, exposure_weights, shows_lists
from builders.ranker.trainer import RankerTrainer
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.steps.blend import Blend

POWERS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
# share of resamples below recall's order that rules a power out, and where the shop chose what it showed
_LIKELY, _SURELY = 2 / 3, 0.975
_LITTLE = 0.01  # of recall's figure may be lost: of many lists, resamples would see the smallest loss
_MOST_LISTS, _MOST_EXPOSURES = 3000, 30_000  # sampled; a thousand tell powers apart
WHY_FEW = "too few held-out items were recalled to choose the power of recall's relevance by"
_FEWEST = 30  # lists in which the true item was recalled, or users whose exposures differ: fewer tell nothing


@dataclass(frozen=True)
class _Asked:
    """Holds lists of which one item is the true one, with what joins into a score."""

    lists: Lists
    values: Array  # [L, N] float32, the tasks' weighted sums
    weights: Array  # [L] float64, how much each list counts

    def gains(self, blend: Blend) -> Array:
        """Gives each list's NDCG@10 [L] under a blend, weighed; 0 where the true item was not recalled."""
        count = len(self.lists)
        powers, uses = np.full(count, blend.power, np.float32), np.full(count, blend.uses_tasks)
        scores = blend.score(self.values, self.lists.scores, powers, uses)
        scores = np.where(self.lists.item_rows > 0, scores, -np.inf)
        true = self.lists.labels[..., 0] == 1
        ranks = metrics.ranks_from_scores(scores, np.where(true.any(1), true.argmax(1), -1))
        return self.weights * metrics.gains(ranks, 10)


def fit_blend(
    trainer: RankerTrainer,
    candidates: CandidateFunction,
    scores: ScoreFunction,
    source_weights: tuple[float, ...],
) -> tuple[Blend, dict[str, Any]]:
    """Chooses the blend of a trained, calibrated ranker; gives it with what was tried. `scores` are
    recall's; the ranker itself reads none of them (CalibratedRanker.score_gate)."""
    dataset, by_exposure = trainer.dataset, shows_lists(trainer.dataset)
    asked = {
        name: _asked(trainer, targets, candidates, by_exposure)
        for name, targets in (("next items", dataset.validation), ("next conversions", _conversions(dataset)))
    }
    first = next(iter(asked.values())).lists
    fused = first.scores @ np.array(source_weights, np.float32)
    slope, bias = calibrate.fit_platt(fused.ravel(), first.labels[..., 0].ravel())
    asked = {name: one for name, one in asked.items() if _num_recalled(one) >= _FEWEST}
    # the plain product of two probabilities; without any recalled item not even one of them is known
    if not asked:
        power = float((first.labels[..., 0] == 1).any())
        return Blend(True, power, source_weights, slope, bias), {"why": WHY_FEW, "power": power}
    options = [Blend(True, power, source_weights, slope, bias) for power in POWERS]
    options.append(Blend(False, 1.0, source_weights, slope, bias))
    exposed = _exposed(trainer, scores)
    tried = [_tried(blend, asked, exposed, options[-1], _most_doubt(by_exposure)) for blend in options]
    best = int(np.argmax(_utilities(tried)))
    return options[best], {"chosen": best, "tried": tried, "by_exposure": by_exposure}


def _most_doubt(by_exposure: bool) -> float:
    """Gives the share of resamples that may see a blend below recall's order."""
    return _SURELY if by_exposure else _LIKELY


def _utilities(tried: list[dict[str, Any]]) -> Array:
    """Gives the sum of each option's shares of the best figure of its kind; -inf for what is ruled out."""
    names = [name for name in tried[0]["figures"] if any(one["figures"][name] > 0 for one in tried)]
    table = np.array([[max(one["figures"][name], 0.0) for name in names] for one in tried])
    shares = (table / np.maximum(table.max(axis=0), 1e-12)).sum(axis=1)
    return np.where([one["ruled_out"] for one in tried], -np.inf, shares)


def _tried(
    blend: Blend,
    asked: dict[str, _Asked],
    exposed: tuple[Array, Array, Array, Array] | None,
    recall: Blend,
    most: float,
) -> dict[str, Any]:
    """Gives an option's figures, and whether more than the share `most` of resamples sees it below recall's
    order by more than a little."""
    figures: dict[str, float] = {}
    ruled_out = False
    for name, one in asked.items():
        gains, base = one.gains(blend), one.gains(recall)
        figures[f"NDCG@10 of {name}"] = float(gains.mean())
        doubt = paired_difference((1 - _LITTLE) * base, gains, one.lists.user_rows).p_worse
        ruled_out |= blend is not recall and doubt > most
    if exposed is not None:
        users, values, offered, labels = exposed
        every = (np.full(len(users), one) for one in (np.float32(blend.power), blend.uses_tasks))
        ranked = blend.score(values[:, None], offered[:, None], *every)[:, 0]
        figures["AUC of exposures within a user, above 1/2"] = auc_within(users, ranked, labels) - 0.5
    option = {"uses_tasks": blend.uses_tasks, "power": blend.power}
    return {**option, "figures": figures, "ruled_out": bool(ruled_out)}


def _asked(
    trainer: RankerTrainer, targets: Targets, candidates: CandidateFunction, by_exposure: bool
) -> _Asked:
    """Asks recall and ranker about (a sample of) the targets, which count by how likely they were shown, or
    alike."""
    places = np.random.default_rng(0).permutation(len(targets.user_rows))[:_MOST_LISTS]
    chosen = np.sort(places)
    some = Targets(targets.user_rows[chosen], targets.history_ends[chosen], targets.item_rows[chosen])
    lists = lists_from_targets(trainer.dataset, some, candidates, trainer.user_rates())
    parts = [np.zeros((0, lists.item_rows.shape[1]), np.float32)]
    for piece in _pieces(len(lists)):
        part = lists.take(piece)
        # logits come in the shape of labels, and those of targets have one column
        wide = np.zeros((*part.item_rows.shape, len(trainer.dataset.schema.tasks)), np.float32)
        parts.append(_values(trainer, trainer.logits(replace(part, labels=wide))))
    weights = np.ones(len(lists))
    if by_exposure:
        true = lists.labels[..., 0] == 1
        weights = exposure_weights(trainer.dataset, lists.user_rows, lists.item_rows, lists.scores, true)
    return _Asked(lists, np.concatenate(parts), weights)


def _pieces(count: int, size: int = 512) -> Iterator[Array]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _num_recalled(one: _Asked) -> int:
    return int((one.lists.labels[..., 0] == 1).any(axis=1).sum())


def _values(trainer: RankerTrainer, logits: Array) -> Array:
    """Gives the tasks' weighted sums [...] of logits [..., T], conditional ones times what they are given."""
    with torch.no_grad():
        values = trainer.model.probabilities(torch.from_numpy(logits)).numpy()
    tasks = trainer.dataset.schema.tasks
    place = {task.name: t for t, task in enumerate(tasks)}
    total = np.zeros(values.shape[:-1], np.float32)
    for t, task in enumerate(tasks):
        if task.given:
            values[..., t] *= values[..., place[task.given]]
        total += task.weight * values[..., t]
    return total


def _conversions(dataset: Dataset) -> Targets:
    """Gives each user's first few held-out exposures that led to the event of the last binary task."""
    shown = dataset.validation_impressions
    assert shown is not None
    binary = binary_tasks(dataset)
    came = shown.labels[:, binary[-1]] == 1 if binary else np.zeros(len(shown.times), bool)
    rows = np.flatnonzero(came)  # in time order
    rows = rows[first_few_of_users(shown.user_rows[rows], num_taken(dataset.histories))]
    return Targets(shown.user_rows[rows], shown.history_ends[rows], shown.item_rows[rows])


def _exposed(trainer: RankerTrainer, scores: ScoreFunction) -> tuple[Array, Array, Array, Array] | None:
    """Gives users [E], the tasks' values [E], recall's scores [E, S] and whether each of (a sample of) the
    held-out exposures came to its first task's event [E] bool; None where too few users tell anything."""
    shown = trainer.dataset.validation_impressions
    assert shown is not None
    binary = binary_tasks(trainer.dataset)
    if not binary:
        return None
    first = binary[0]
    order = np.random.default_rng(0).permutation(trainer.dataset.num_users + 1)[shown.user_rows]
    rows = np.flatnonzero(~np.isnan(shown.labels[:, first]))
    rows = np.sort(rows[np.argsort(order[rows], kind="stable")][:_MOST_EXPOSURES])  # whole users
    some = shown.at(rows)
    if len(np.unique(some.user_rows[some.labels[:, first] == 1])) < _FEWEST:
        return None
    states = states_of(trainer.dataset, some, trainer.user_rates()[some.user_rows])
    lists, places = lists_from_impressions(some, scores, states, by_moment=True)
    tasks = len(trainer.dataset.schema.tasks)
    values = _values(trainer, trainer.logits(lists).reshape(-1, tasks)[places])
    flat = lists.scores.reshape(-1, lists.scores.shape[2])[places]
    return some.user_rows, values, flat, some.labels[:, first] == 1


def auc_within(users: Array, scores: Array, labels: Array) -> float:
    """Gives the share of pairs of one positive and one negative of the same user [E] that scores order
    rightly; .5 where no user has both. labels [E] bool."""
    order = np.lexsort((scores, users))
    users, labels = users[order], labels[order]
    _, owner, counts = np.unique(users, return_inverse=True, return_counts=True)
    place = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts) + 1.0
    positives = np.bincount(owner, labels)
    pairs = positives * (counts - positives)
    right = np.bincount(owner, place * labels) - positives * (positives + 1) / 2
    return float(right[pairs > 0].sum() / pairs.sum()) if pairs.sum() else 0.5

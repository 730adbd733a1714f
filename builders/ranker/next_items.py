"""Trains the ranker of a shop without labels, `interact`: recall's own candidates plus uniform items around
held-out next items.

The encoders have seen the train positions, so recall's scores are too good there; the validation targets are
the first on which they are what serving will see. The ranker therefore learns from a share of the users'
validation targets, stops early on the other users', and falls back to recall's order where that is as likely
to give their next items.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from builders import metrics
from builders.data.dataset import Targets
from builders.index.offline import CandidateFunction, ScoreFunction
from builders.learning import learning_report
from builders.ranker import calibrate
from builders.ranker.config import RankerTraining
from builders.ranker.figures import calibrate_ranker, figures_of
from builders.ranker.lists import Lists, lists_from_targets, with_uniform
from builders.ranker.loss import list_loss
from builders.ranker.model import Ranker
from builders.ranker.standardize import standardize_scores, standardize_states
from builders.ranker.trainer import RankerTrainer
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference

_FEW_TARGETS = 50  # with fewer recalled targets than this nothing is learned: recall's order stays
# The deep path stays if fewer resamples of held-out users than this see the loss of their next items above
# that of recall's order, and it is not sure that their NDCG@10 is below. That alone is too noisy to decide:
# it hardly moved on Beauty, and fell on LastFM, where test users gained
_DOUBT, _SURE = 0.15, 0.975


def fit_lists(
    trainer: RankerTrainer,
    candidates: CandidateFunction,
    scores: ScoreFunction,
    source_weights: tuple[float, ...],
) -> dict[str, Any]:
    """Trains around most users' validation targets, stops and calibrates on the others'. -> report."""
    trainer.config = replace(
        trainer.config,
        epochs=trainer.config.list_epochs,
        learning_rate=trainer.config.list_learning_rate,
        average=0.0,
    )
    dataset, c = trainer.dataset, trainer.config
    lists = lists_from_targets(dataset, dataset.validation, candidates, trainer.user_rates())
    learn, judged = _parts(lists, c.held_out, trainer.rng)
    recalled = learn.take(np.flatnonzero((learn.labels[:, :, 0] == 1).any(1)))
    _start_at_recall(trainer, learn, source_weights)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    users, before = _next_item_losses(trainer, judged)

    kept, curve, longer = 0, list[dict[str, float]](), list[dict[str, float]]()
    if len(recalled) >= _FEW_TARGETS and len(before):
        pool = with_uniform(recalled, dataset.num_items, c.uniform_negatives, scores, trainer.rng)
        kept, curve, longer = trainer.fit_shorter(
            lambda: _sampled(pool, c, trainer.rng),
            list_loss,
            lambda: float(_next_item_losses(trainer, judged)[1].mean()),
        )
    fall = paired_difference(_next_item_losses(trainer, judged)[1], before, users)
    gain = paired_difference(
        metrics.gains(_recall_ranks(judged), 10), metrics.gains(_ranks(trainer, judged), 10), judged.user_rows
    )
    deep = kept > 0 and fall.p_worse <= _DOUBT and gain.p_worse < _SURE
    if not deep and isinstance(trainer.model, Ranker):
        trainer.model.load_state_dict({**start, "deep_gate": torch.zeros(())})
    logits = trainer.logits(judged)
    calibrate_ranker(trainer, logits.reshape(-1, 1), judged.labels.reshape(-1, 1))
    report = {
        **learning_report(kept, curve, "loss of held-out users' next items"),
        "longer": longer,
        "deep_path": deep,
        "loss_fell_on_held_out_users": str(fall),
        "gain_on_held_out_users": str(gain),
        "validation": _list_figures(trainer, judged),
    }
    if len(dataset.test.user_rows):
        test = _sampled_targets(dataset.test, c.test_lists, trainer.rng)
        asked = lists_from_targets(dataset, test, candidates, trainer.user_rates())
        report["test"] = _list_figures(trainer, asked)
    return report


def _parts(lists: Lists, share: float, rng: np.random.Generator) -> tuple[Lists, Lists]:
    """Gives the lists to learn from, and those of a share of the users, which judge."""
    users = np.unique(lists.user_rows)
    held_users = rng.permutation(users)[: max(1, round(share * len(users)))]
    held = np.isin(lists.user_rows, held_users)
    return lists.take(np.flatnonzero(~held)), lists.take(np.flatnonzero(held))


def _sampled_targets(targets: Targets, most: int, rng: np.random.Generator) -> Targets:
    """Draws at most `most` of the targets, in their order."""
    chosen = np.sort(rng.permutation(len(targets.user_rows))[:most])
    return Targets(targets.user_rows[chosen], targets.history_ends[chosen], targets.item_rows[chosen])


def _start_at_recall(trainer: RankerTrainer, lists: Lists, source_weights: tuple[float, ...]) -> None:
    """Sets the wide path to recall's fused score as log odds: the first state has recall's order."""
    standardize_scores(trainer, lists)
    if not isinstance(trainer.model, Ranker):
        return
    standardize_states(trainer, lists, np.zeros(1, np.float32))
    weights = np.asarray(source_weights, np.float32)
    slope, bias = calibrate.fit_platt((lists.scores @ weights).reshape(-1), lists.labels[..., 0].reshape(-1))
    model = trainer.model
    with torch.no_grad():
        model.wide.weight.copy_(slope * torch.from_numpy(weights) / model.score_scale)
        model.wide.bias.fill_(bias + slope * float((torch.from_numpy(weights) * model.score_mean).sum()))


def _sampled(lists: Lists, config: RankerTraining, rng: np.random.Generator) -> Lists:
    """Draws of each list the positive, all uniform items and `list_negatives` of the recalled ones, anew."""
    key = rng.random(lists.item_rows.shape)
    key[:, lists.item_rows.shape[1] - config.uniform_negatives :] -= 1
    key = np.where(lists.item_rows > 0, key, 3.0)
    key[lists.labels[..., 0] == 1] = -2
    width = min(key.shape[1], config.list_negatives + config.uniform_negatives + 1)
    columns = np.argpartition(key, width - 1, axis=1)[:, :width]
    rows, labels = (
        np.take_along_axis(lists.item_rows, columns, 1),
        np.take_along_axis(lists.labels, columns[:, :, None], 1),
    )
    return replace(
        lists,
        item_rows=rows,
        scores=np.take_along_axis(lists.scores, columns[:, :, None], 1),
        labels=labels,
    )


def _next_item_losses(trainer: RankerTrainer, lists: Lists) -> tuple[Array, Array]:
    """Gives users and -log(share) [R] of the positives that were recalled, under a softmax of the logits over
    each list at the scale that is best for them: so it tells orders, and sees every place that a next item
    gains, of which NDCG@10 sees the first ten."""
    recalled = lists.take(np.flatnonzero((lists.labels[..., 0] == 1).any(1)))
    labels, logits = recalled.labels[..., 0], trainer.logits(recalled)[..., 0]
    logits = calibrate.fit_share_slope(logits, labels) * logits
    shares = torch.from_numpy(np.where(np.isnan(labels), -np.inf, logits)).log_softmax(-1).numpy()
    return recalled.user_rows, -shares[labels == 1].astype(np.float64)


def _ranks(trainer: RankerTrainer, lists: Lists) -> Array:
    """Gives the rank of each list's positive by the ranker, ties half; inf where it was not recalled."""
    logits = np.where(lists.item_rows > 0, trainer.logits(lists)[..., 0], -np.inf)
    positive = lists.labels[..., 0] == 1
    return metrics.ranks_from_scores(logits, np.where(positive.any(1), positive.argmax(1), -1))


def _recall_ranks(lists: Lists) -> Array:
    """Gives the rank of each list's positive in recall's own order; inf where it was not recalled."""
    positive = lists.labels[..., 0] == 1
    return np.where(positive.any(1), positive.argmax(1).astype(np.float64), metrics.MISSED)


def _list_figures(trainer: RankerTrainer, lists: Lists) -> dict[str, Any]:
    """Gives the task's figures over recall's candidates, and NDCG@10 of recall's order and the ranker's."""
    figures = figures_of(trainer, trainer.logits(lists).reshape(-1, 1), lists.labels.reshape(-1, 1))
    first, second = metrics.gains(_recall_ranks(lists), 10), metrics.gains(_ranks(trainer, lists), 10)
    gain = paired_difference(first, second, lists.user_rows)
    return {
        **figures,
        "ndcg@10": {"recall": float(first.mean()), "ranker": float(second.mean()), "gain": str(gain)},
    }

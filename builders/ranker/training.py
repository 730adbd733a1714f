"""Trains the ranker, the item head beside it, and the two tables of rows that the snapshot will hold.

With labels: all tasks on all impressions, CVR over the whole space (ESMM). Without labels (`interact`):
recall's own candidates plus uniform items around held-out next items. The encoders have seen the train
positions, so recall's scores are too good there; the validation targets are the first on which they are what
serving will see. The ranker therefore learns from a share of the users' validation targets, stops early on
the other users', and falls back to recall's order where that is as likely to give their next items.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from builders import metrics
from builders.data.dataset import Dataset, Impressions, Targets
from builders.data.places import places_of
from builders.index.offline import CandidateFunction, ScoreFunction
from builders.learning import learning_report
from builders.progress import Progress, Watch, unwatched
from builders.ranker import calibrate
from builders.ranker.blend import fit_blend
from builders.ranker.checkpoint import RankerCheckpoint
from builders.ranker.config import BASE_TRAINING, RankerTraining, small_of, with_tried_rows
from builders.ranker.lists import (
    Lists,
    States,
    lists_from_impressions,
    lists_from_targets,
    no_scores,
    states_of,
    with_uniform,
)
from builders.ranker.loss import Loss, impression_loss, list_loss
from builders.ranker.model import (
    OwnRanker,
    Ranker,
    flops_per_user,
    num_parameters,
)
from builders.ranker.positions import Positions, fit_positions, place_facts
from builders.ranker.standardize import label_scales, standardize_scores, standardize_states
from builders.ranker.trainer import RankerTrainer
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput
from ensemble.schema import Task
from ensemble.steps.blend import Blend

# Training candidates on which settings of the rows are tried: in ten steps of a sample of 20,000, rows that
# learn fast had hardly begun to learn single clicks by heart, and were chosen
_TRIED = 100_000
_NO_GAIN = 0.005  # share of the held-out loss below which stronger rows are not worth their risk
_FEW_TARGETS = 50  # with fewer recalled targets than this nothing is learned: recall's order stays
# The deep path stays if fewer resamples of held-out users than this see the loss of their next items above
# that of recall's order, and it is not sure that their NDCG@10 is below. That alone is too noisy to decide:
# it hardly moved on Beauty, and fell on LastFM, where test users gained
_DOUBT, _SURE = 0.15, 0.975


def train_ranker(
    dataset: Dataset,
    item_embeddings: Array,
    *,
    scores: ScoreFunction,
    candidates: CandidateFunction | None = None,
    source_weights: tuple[float, ...] = (1.0, 1.0, 0.0),
    config: RankerTraining = BASE_TRAINING,
    ranker: nn.Module | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> RankerCheckpoint:
    """Trains on the dataset's impressions if it has any, else on recall's `candidates` of the validation
    targets.

    item_embeddings [I + 1, D] float32 are frozen; `scores` are recall's, from which the ranker of `interact`
    learns, and by which the blend of a shop with labels is fitted; source_weights [S] are those of recall's
    fused score, where the ranker of `interact` starts; `ranker` is a user's own module with the contract's
    tensors. The same seed gives the same numbers.
    """
    if dataset.train_impressions is None and candidates is None:
        raise ValueError(
            f"shop {dataset.schema.shop} has no impressions: train_ranker needs recall's `candidates`"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def begin(config: RankerTraining, progress: Progress, watch: Watch) -> RankerTrainer:
            schema = dataset.schema
            model = Ranker(schema, config.model) if ranker is None else OwnRanker(schema, ranker)
            rng = np.random.default_rng(seed)
            return RankerTrainer(dataset, item_embeddings, model, config, rng, progress, watch)

        progress = progress or (lambda done, text: None)
        trainer = begin(config, progress, watch)
        blend, positions = Blend(), None
        if candidates is None or dataset.train_impressions is not None:
            report, positions = _fit_impressions(trainer)
            if config.tries_small and ranker is None:
                small = begin(small_of(config), lambda done, text: progress(done, f"small {text}"), unwatched)
                trainer, report, positions = _better(
                    (trainer, report, positions), (small, *_fit_impressions(small))
                )
            if candidates is not None:
                blend, report["blend"] = fit_blend(trainer, candidates, scores, source_weights)
        else:
            report = _fit_lists(trainer, candidates, scores, source_weights)
    trainer.trained.eval()
    trainer.forget_unread()
    model = trainer.model
    report["parameters"] = num_parameters(model)
    if isinstance(model, Ranker):
        report["mflops_per_user"] = flops_per_user(model, dataset.schema.sizes.candidates) / 1e6
    return checkpoint_of(trainer, blend, positions, report)


_Fitted = tuple[RankerTrainer, dict[str, Any], Positions | None]


def _better(large: _Fitted, small: _Fitted) -> _Fitted:
    """Gives the one under which held-out exposures are likelier; its report names the other."""
    losses = [report["curve"][report["kept_epoch"]]["validation"] for _, report, _ in (large, small)]
    is_small = losses[1] < losses[0]
    trainer, report, positions = small if is_small else large
    sizes = {"is_small": is_small, "losses": {"large": losses[0], "small": losses[1]}}
    return trainer, {**report, **sizes}, positions


def checkpoint_of(
    trainer: RankerTrainer, blend: Blend, positions: Positions | None, report: dict[str, Any]
) -> RankerCheckpoint:
    """Gathers what export and snapshot need of a trainer that is done."""
    return RankerCheckpoint(
        trainer.model,
        trainer.head,
        trainer.item_id_features(),
        trainer.item_features(),
        trainer.user_features(),
        trainer.user_rates(),
        blend,
        positions,
        report,
    )


# --- a shop with labels


def _fit_impressions(trainer: RankerTrainer) -> tuple[dict[str, Any], Positions | None]:
    """Trains on train_impressions, stops and calibrates on validation_impressions; gives the report, and what
    places do, where the shop logs them."""
    dataset, tasks = trainer.dataset, trainer.dataset.schema.tasks
    train, validation = dataset.train_impressions, dataset.validation_impressions
    if train is None or validation is None:
        raise ValueError("train_impressions and validation_impressions go together")
    trainer.model.score_gate.zero_()  # recall has counted what labels the impressions: see no_scores
    rates = trainer.rates
    assert rates is not None
    unscored = no_scores(dataset.schema)
    known = states_of(dataset, train, rates.of_rows[1], rates.of_rows[0])
    train_lists, _ = lists_from_impressions(train, unscored, known, by_moment=trainer.apart)
    held_out = states_of(dataset, validation, rates.users[validation.user_rows])
    validation_lists, places = lists_from_impressions(validation, unscored, held_out, by_moment=trainer.apart)
    standardize_states(trainer, train_lists, rates.priors)
    mean, spread = label_scales(tasks, train.labels)
    loss = impression_loss(tasks, trainer.config.conditional)
    scaled = replace(train_lists, labels=(train_lists.labels - mean) / spread)
    target = torch.from_numpy((validation.labels - mean) / spread)

    if train_lists.places is not None:
        facts = place_facts(dataset.schema, known.users, known.candidates)
        trainer.positions.start(tasks, places_of(train.positions), facts, train.labels)

    def judge() -> float:
        logits = trainer.logits(validation_lists, with_positions=True).reshape(-1, len(tasks))[places]
        return float(loss(torch.from_numpy(logits), target))

    rows_tried = _choose_rows(trainer, scaled, loss, judge)
    kept, curve, longer = trainer.fit_shorter(lambda: scaled, loss, judge)
    logits = trainer.logits(validation_lists).reshape(-1, len(tasks))[places]
    _calibrate(trainer, logits, validation.labels)
    positions = _fit_positions(trainer, logits, validation, held_out)
    report: dict[str, Any] = {
        **learning_report(kept, curve, "loss of held-out impressions"),
        "longer": longer,
        "rows_tried": rows_tried,
        "label_scales": {"mean": mean.tolist(), "spread": spread.tolist()},
        "validation": _figures(trainer, logits, validation.labels),
    }
    if dataset.test_impressions is not None:
        report["test"] = _figures(
            trainer,
            _impression_logits(trainer, dataset.test_impressions),
            dataset.test_impressions.labels,
        )
    return report, positions


def _fit_positions(
    trainer: RankerTrainer, logits: Array, held_out: Impressions, states: States
) -> Positions | None:
    """Fits what places do to served values: logits [E, T] of the held-out exposures, without places; None
    where the shop logs none."""
    if not (learned := trainer.positions.learned).any():
        return None
    model, schema = trainer.model, trainer.dataset.schema
    served = model.calibration_scale.numpy(), model.calibration_bias.numpy()
    facts = place_facts(schema, states.users, states.candidates)
    places = places_of(held_out.positions)
    return fit_positions(schema.tasks, learned, served, logits, places, facts, held_out.labels)


def _choose_rows(
    trainer: RankerTrainer, lists: Lists, loss: Loss, judge: Callable[[], float]
) -> list[dict[str, float]]:
    """Chooses how strongly rows of single users and items are learned: what a shop's data bear differs, and
    too much learns clicks by heart. Each setting is a short training on the same lists, from the same
    weights. Chosen are the slowest rows that are as good as the best (Breiman et al. 1984, section 3.4.3);
    gives what was tried, the chosen first."""
    c = trainer.config
    settings = sorted({(c.row_rate, c.id_dropout), *c.tried_rows})
    if len(settings) == 1:
        return []
    start, read = copy.deepcopy(trainer.trained.state_dict()), (trainer.read_items, trainer.read_users)
    most = max(1, _TRIED // lists.item_rows.shape[1])
    sample = lists.take(np.sort(np.random.default_rng(0).permutation(len(lists))[:most]))
    tried = []
    for row_rate, id_dropout in settings:
        trainer.restart(replace(c, row_rate=row_rate, id_dropout=id_dropout, epochs=c.tried_epochs))
        figure = trainer.passes(sample, loss, judge)
        tried.append({"row_rate": row_rate, "id_dropout": id_dropout, "validation": figure})
        text = f"rows at {row_rate:g}, dropout {id_dropout:g}: validation {figure:.5f}"
        trainer.progress(0.0, f"ranker: {text}")
        trainer.trained.load_state_dict(start)
    for was_read in read:
        was_read.fill_(False)
    best = min(one["validation"] for one in tried)
    if not np.isfinite(best):
        raise InvalidInput(
            f"the ranker's loss of held-out exposures is {best} after {c.tried_epochs} epochs: its outputs "
            "must stay finite; a module of your own must bear the inputs' range (clamp before exp or log)"
        )
    chosen = next(one for one in tried if one["validation"] <= best + _NO_GAIN * abs(best))
    tried.sort(key=lambda one: (one is not chosen, one["validation"]))
    trainer.restart(with_tried_rows(c, tried))
    return tried


def _impression_logits(trainer: RankerTrainer, impressions: Impressions) -> Array:
    """Gives logits [E, T] before calibration, in the order of the impressions."""
    states = states_of(trainer.dataset, impressions, trainer.user_rates()[impressions.user_rows])
    unscored = no_scores(trainer.dataset.schema)
    lists, places = lists_from_impressions(impressions, unscored, states, by_moment=trainer.apart)
    return trainer.logits(lists).reshape(-1, impressions.labels.shape[1])[places]


# --- a shop without labels


def _fit_lists(
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
    users = np.unique(lists.user_rows)
    held_users = trainer.rng.permutation(users)[: max(1, round(c.held_out * len(users)))]
    held = np.isin(lists.user_rows, held_users)
    learn, judged = lists.take(np.flatnonzero(~held)), lists.take(np.flatnonzero(held))
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
    _calibrate(trainer, logits.reshape(-1, 1), judged.labels.reshape(-1, 1))
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
    figures = _figures(trainer, trainer.logits(lists).reshape(-1, 1), lists.labels.reshape(-1, 1))
    first, second = metrics.gains(_recall_ranks(lists), 10), metrics.gains(_ranks(trainer, lists), 10)
    gain = paired_difference(first, second, lists.user_rows)
    return {
        **figures,
        "ndcg@10": {"recall": float(first.mean()), "ranker": float(second.mean()), "gain": str(gain)},
    }


# --- both


def _calibrate(trainer: RankerTrainer, logits: Array, labels: Array) -> None:
    """Fits and folds in the affine map of each task. logits and labels [E, T]."""
    scale, bias = calibrate.fit(trainer.dataset.schema.tasks, logits, labels)
    trainer.model.calibration_scale.copy_(torch.from_numpy(scale))
    trainer.model.calibration_bias.copy_(torch.from_numpy(bias))


def _figures(trainer: RankerTrainer, logits: Array, labels: Array) -> dict[str, Any]:
    """Gives AUC, ECE, log loss (binary) or RMSE (regression) by task. logits and labels [E, T]."""
    with torch.no_grad():
        outputs = trainer.model.probabilities(torch.from_numpy(logits)).numpy()
    return {
        task.name: task_figures(task, labels[:, t], outputs[:, t])
        for t, task in enumerate(trainer.dataset.schema.tasks)
    }


def task_figures(task: Task, labels: Array, outputs: Array) -> dict[str, float]:
    """Gives one task's figures: labels [E] (NaN = not defined), calibrated outputs [E]."""
    if task.kind == "regression":
        return {"rmse": metrics.rmse(labels, outputs)}
    return {
        "auc": metrics.auc(labels, outputs),
        "ece": metrics.ece(labels, outputs),
        "log_loss": metrics.log_loss(labels, outputs),
    }

"""Trains the ranker, the item head beside it, and the two tables of rows that the snapshot will hold.

With labels: all tasks on all impressions, CVR over the whole space (ESMM). Without labels: next_items.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.data.dataset import Dataset, Impressions
from builders.data.places import places_of
from builders.index.offline import CandidateFunction, ScoreFunction
from builders.learning import learning_report, size_line
from builders.progress import Progress, Watch, unwatched
from builders.ranker.blend import fit_blend
from builders.ranker.checkpoint import RankerCheckpoint
from builders.ranker.config import BASE_TRAINING, RankerTraining, small_of, with_tried_rows
from builders.ranker.figures import calibrate_ranker, figures_of
from builders.ranker.lists import (
    Lists,
    States,
    lists_from_impressions,
    no_scores,
    states_of,
)
from builders.ranker.loss import Loss, impression_loss
from builders.ranker.model import (
    OwnRanker,
    Ranker,
    flops_per_user,
    num_parameters,
)
from builders.ranker.next_items import fit_lists
from builders.ranker.positions import Positions, fit_positions, place_facts
from builders.ranker.standardize import label_scales, standardize_states
from builders.ranker.trainer import RankerTrainer
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.steps.blend import Blend

# Training candidates on which settings of the rows are tried: in ten steps of a sample of 20,000, rows that
# learn fast had hardly begun to learn single clicks by heart, and were chosen
_TRIED = 100_000
_NO_GAIN = 0.005  # share of the held-out loss below which stronger rows are not worth their risk


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

        begin = partial(_begin, dataset, item_embeddings, ranker, seed)
        progress = progress or (lambda done, text: None)
        trainer = begin(config, progress, watch)
        blend, positions = Blend(), None
        if candidates is None or dataset.train_impressions is not None:
            report, positions = _fit_impressions(trainer)
            if config.tries_small and ranker is None:
                small = begin(small_of(config), lambda done, text: progress(done, f"small {text}"), unwatched)
                beside = (small, *_fit_impressions(small))
                trainer, report, positions = _better((trainer, report, positions), beside)
                progress(1.0, size_line(report))
            if candidates is not None:
                blend, report["blend"] = fit_blend(trainer, candidates, scores, source_weights)
        else:
            report = fit_lists(trainer, candidates, scores, source_weights)
    trainer.trained.eval()
    trainer.forget_unread()
    model = trainer.model
    report["parameters"] = num_parameters(model)
    if isinstance(model, Ranker):
        report["mflops_per_user"] = flops_per_user(model, dataset.schema.sizes.candidates) / 1e6
    return checkpoint_of(trainer, blend, positions, report)


def _begin(
    dataset: Dataset,
    item_embeddings: Array,
    ranker: nn.Module | None,
    seed: int,
    config: RankerTraining,
    progress: Progress,
    watch: Watch,
) -> RankerTrainer:
    """Begins a training from new weights: of a network of the config's size, or of the user's own module."""
    model = Ranker(dataset.schema, config.model) if ranker is None else OwnRanker(dataset.schema, ranker)
    rng = np.random.default_rng(seed)
    return RankerTrainer(dataset, item_embeddings, model, config, rng, progress, watch)


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
        trainer.events,
        trainer.item_id_features(),
        trainer.item_features(),
        trainer.user_features(),
        trainer.user_rates(),
        blend,
        positions,
        report,
    )


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
    calibrate_ranker(trainer, logits, validation.labels)
    positions = _fit_positions(trainer, logits, validation, held_out)
    report: dict[str, Any] = {
        **learning_report(kept, curve, "loss of held-out impressions"),
        "longer": longer,
        "rows_tried": rows_tried,
        "label_scales": {"mean": mean.tolist(), "spread": spread.tolist()},
        "validation": figures_of(trainer, logits, validation.labels),
    }
    if dataset.test_impressions is not None:
        report["test"] = figures_of(
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

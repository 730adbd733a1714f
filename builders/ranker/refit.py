"""Fits a verified ranker on: from its weights, on the impressions that were held out. Those that it knows are
left out, as its rows of users and items would learn them by heart.

Its calibration, its gates and the scales of its inputs are the verified ones: the rows that they were fitted
on are trained on by then, and would flatter it. Without labels nothing is trained: recall's scores of rows
that the encoders have learned by heart say more than they will when served, and no other rows are left. The
items' features are then made anew, of the refitted encoders' embeddings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from builders.data.dataset import Dataset, Impressions
from builders.progress import Progress
from builders.ranker.checkpoint import RankerCheckpoint
from builders.ranker.config import RankerTraining, trained_as
from builders.ranker.lists import lists_from_impressions, no_scores, states_of
from builders.ranker.loss import impression_loss
from builders.ranker.trainer import RankerTrainer
from builders.ranker.training import checkpoint_of
from builders.weights import require_finite
from ensemble.arrays import Array

REFIT_SHARE = 0.5  # of the schedule that is replayed
FEWEST_EPOCHS = 2  # after a single one the level of the probabilities is still on its way (BENCHMARKS.md)


def refit_ranker(
    dataset: Dataset,
    item_embeddings: Array,
    verified: RankerCheckpoint,
    known: int,
    *,
    config: RankerTraining,
    seed: int = 0,
    progress: Progress,
) -> RankerCheckpoint:
    """Goes on from the verified ranker, which has learned from the first `known` of the dataset's training
    impressions, over the others; without any only the items' features are made anew."""
    config = trained_as(config, verified.report)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trainer = RankerTrainer(
            dataset, item_embeddings, verified.ranker, config, np.random.default_rng(seed), progress
        )
        trainer.start_from(verified)
        if verified.positions is not None:
            learned = torch.from_numpy(verified.positions.learned)
            trainer.positions.table.data.copy_(learned.flatten(1))
        epochs, impressions = 0, dataset.train_impressions
        if impressions is not None and len(impressions.times) > known and verified.report["kept_epoch"]:
            epochs = max(FEWEST_EPOCHS, verified.report["kept_epoch"])
            _go_on(trainer, impressions, known, verified, epochs)
    trainer.trained.eval()
    trainer.forget_unread()
    require_finite("ranker", trainer.trained.state_dict())
    positions = verified.positions and replace(verified.positions, learned=trainer.positions.learned)
    return checkpoint_of(trainer, verified.blend, positions, {**verified.report, "refit_epochs": epochs})


def _go_on(
    trainer: RankerTrainer,
    impressions: Impressions,
    known: int,
    verified: RankerCheckpoint,
    epochs: int,
) -> None:
    """Trains on the impressions behind the `known` first, numbers standardized as they were in the verified
    training."""
    scales = verified.report["label_scales"]
    mean, spread = (np.array(scales[name], np.float32) for name in ("mean", "spread"))
    assert trainer.rates is not None
    new, (item_rates, user_rates) = impressions.behind(known), trainer.rates.of_rows
    states = states_of(trainer.dataset, new, user_rates[known:], item_rates[known:])
    unscored = no_scores(trainer.dataset.schema)
    lists, _ = lists_from_impressions(new, unscored, states, by_moment=trainer.apart)
    loss = impression_loss(trainer.dataset.schema.tasks, trainer.config.conditional)
    trainer.go_on(replace(lists, labels=(lists.labels - mean) / spread), loss, epochs, REFIT_SHARE)

"""Sets the scales of what the ranker reads and learns, by the training lists."""

from __future__ import annotations

import numpy as np
import torch

from builders.ranker.lists import Lists
from builders.ranker.model import Ranker
from builders.ranker.trainer import RankerTrainer
from ensemble.activity import context_columns
from ensemble.arrays import Array
from ensemble.schema import Task

_ALIKE = 1e-3  # a state's deviation below which it tells nothing: it is left out


def standardize_scores(trainer: RankerTrainer, lists: Lists) -> None:
    """Standardizes each source's score over the training lists, inside the graph."""
    seen = lists.scores[lists.item_rows > 0] * trainer.model.score_gate.numpy()
    if isinstance(trainer.model, Ranker) and len(seen):
        spread = seen.std(0)
        trainer.model.score_mean.copy_(torch.from_numpy(seen.mean(0)))
        trainer.model.score_scale.copy_(
            torch.from_numpy(np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 1.0).astype(np.float32))
        )


def standardize_states(trainer: RankerTrainer, lists: Lists, priors: Array) -> None:
    """Standardizes user and candidate state over the training lists, inside the graph, and starts each task
    at its own rate: priors [T] are the logits of all exposures'."""
    model = trainer.model
    if not isinstance(model, Ranker) or not len(lists):
        return
    there = lists.item_rows > 0
    own = [np.broadcast_to(lists.candidate_state, (*there.shape, lists.candidate_state.shape[2]))[there]]
    if lists.item_rates is not None:
        own.append(lists.item_rates[there])
    users = np.broadcast_to(lists.user_state, (*there.shape, lists.user_state.shape[2]))[there]
    for name, values in (("user_state", users), ("candidate_state", np.concatenate(own, axis=1))):
        values = values.astype(np.float32)
        mean, spread = values.mean(axis=0), values.std(axis=0)
        scale = np.where(spread > _ALIKE, 1 / np.maximum(spread, _ALIKE), 0.0).astype(np.float32)
        if name == "user_state":  # 0 and 1, or standardized already; absent stays 0, and rare values small
            said = context_columns(trainer.dataset.schema)
            mean[said], scale[said] = 0, 1
        model.get_buffer(f"{name}_mean").copy_(torch.from_numpy(mean))
        model.get_buffer(f"{name}_scale").copy_(torch.from_numpy(scale))
    with torch.no_grad():
        model.wide.bias.copy_(torch.from_numpy(priors))


def label_scales(tasks: tuple[Task, ...], labels: Array) -> tuple[Array, Array]:
    """Gives mean and deviation [T] float32 of regression tasks' labels; 0 and 1 for binary ones."""
    mean, spread = np.zeros(len(tasks), np.float32), np.ones(len(tasks), np.float32)
    for place, task in enumerate(tasks):
        known = labels[~np.isnan(labels[:, place]), place]
        if task.kind == "regression" and len(known):
            mean[place], spread[place] = known.mean(), max(float(known.std()), 1e-6)
    return mean, spread

"""Calibrates a trained ranker on held-out rows, and says how good it is there. Axes: E rows, T tasks."""

from __future__ import annotations

from typing import Any

import torch

from builders import metrics
from builders.ranker import calibrate
from builders.ranker.trainer import RankerTrainer
from ensemble.arrays import Array
from ensemble.schema import Task


def calibrate_ranker(trainer: RankerTrainer, logits: Array, labels: Array) -> None:
    """Fits and folds in the affine map of each task. logits and labels [E, T]."""
    scale, bias = calibrate.fit(trainer.dataset.schema.tasks, logits, labels)
    trainer.model.calibration_scale.copy_(torch.from_numpy(scale))
    trainer.model.calibration_bias.copy_(torch.from_numpy(bias))


def figures_of(trainer: RankerTrainer, logits: Array, labels: Array) -> dict[str, Any]:
    """Gives AUC, ECE, log loss (binary) or RMSE (regression) by task. logits and labels [E, T]."""
    with torch.no_grad():
        outputs = trainer.model.probabilities(torch.from_numpy(logits)).numpy()
    return {
        task.name: _task_figures(task, labels[:, t], outputs[:, t])
        for t, task in enumerate(trainer.dataset.schema.tasks)
    }


def _task_figures(task: Task, labels: Array, outputs: Array) -> dict[str, float]:
    """Gives one task's figures: labels [E] (NaN = not defined), calibrated outputs [E]."""
    if task.kind == "regression":
        return {"rmse": metrics.rmse(labels, outputs)}
    return {
        "auc": metrics.auc(labels, outputs),
        "ece": metrics.ece(labels, outputs),
        "log_loss": metrics.log_loss(labels, outputs),
    }

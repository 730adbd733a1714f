"""Computes the ranker's losses. Axes: L lists, N items a list, T tasks. Labels are NaN where undefined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ensemble.schema import Task

Loss = Callable[[Tensor, Tensor], Tensor]


def impression_loss(tasks: tuple[Task, ...], conditional: float = 0.0) -> Loss:
    """Sums the losses of all tasks, each per impression that the task could apply to.

    A binary task that is `given` another one is trained on the product of the chain's probabilities over all
    impressions (ESMM), so that it is right where nothing was clicked too; `conditional` adds the loss over
    its own rows alone. Numbers are trained on the rows that have one; their labels come standardized.
    """
    places = {task.name: place for place, task in enumerate(tasks)}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        # task -> log probability, label and mask of all its chain
        chain: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def joint(task: Task) -> tuple[Tensor, Tensor, Tensor]:
            if task.name not in chain:
                logit, label = logits[..., places[task.name]], labels[..., places[task.name]]
                log_p, defined = functional.logsigmoid(logit), ~label.isnan()
                if task.given is not None:
                    given_log_p, given_label, defined = joint(tasks[places[task.given]])
                    log_p, label = log_p + given_log_p, label.nan_to_num(0.0) * given_label
                chain[task.name] = (log_p, label, defined)
            return chain[task.name]

        total = logits.sum() * 0.0
        rows = (~labels.isnan()).any(-1).sum().clamp(min=1)
        for place, task in enumerate(tasks):
            own = ~labels[..., place].isnan()
            logit, label = logits[..., place][own], labels[..., place][own]
            if task.kind == "regression":
                total = total + functional.mse_loss(logit, label, reduction="sum") / rows
                continue
            log_p, whole, defined = joint(task)
            total = total + _log_loss(log_p[defined], whole[defined]).sum() / rows
            if task.given is not None and conditional:
                own_loss = functional.binary_cross_entropy_with_logits(logit, label, reduction="sum")
                total = total + conditional * own_loss / rows
        return total

    return loss


def list_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Gives softmax cross entropy of the positives plus a tenth of all items' log loss; [L, N, 1] each."""
    logits, labels = logits[..., 0], labels[..., 0]
    defined = ~labels.isnan()
    positive = defined & (labels > 0.5)
    log_share = torch.where(defined, logits, torch.full_like(logits, -1e4)).log_softmax(-1)
    order = -(log_share * positive).sum() / positive.sum().clamp(min=1)
    level = functional.binary_cross_entropy_with_logits(logits[defined], labels[defined], reduction="mean")
    return order + 0.1 * level


def _log_loss(log_p: Tensor, label: Tensor) -> Tensor:
    """Gives log loss from log probabilities: -(y log p + (1 - y) log(1 - p)), finite for p near 1."""
    log_p = log_p.clamp(max=-1e-6)
    return -(label * log_p + (1 - label) * torch.log(-torch.expm1(log_p)))

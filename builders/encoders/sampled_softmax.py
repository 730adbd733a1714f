"""Keeps the price of a large catalogue in training small: a sampled loss, an optimizer of touched rows.

Axes: P positions, N candidates, D embedding.
"""

from typing import Any

import torch
from torch import Tensor


class SampledSoftmax(torch.autograd.Function):
    """Computes the mean cross-entropy of users [P, D] against candidates [N, D] in slices that stay cached.

    Gradients are made on the way forward, so the [P, N] logits, by far the largest tensor, never exist at
    once.
    """

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, log_chance: Tensor, targets: Tensor, kind: torch.dtype
    ) -> Tensor:
        narrow, wide = items.to(kind), torch.zeros_like(items)
        user_grad, total = torch.empty_like(users), torch.zeros(())
        for start in range(0, len(users), 512):
            part = users[start : start + 512].to(kind)
            target = targets[start : start + 512, None]
            logits = (part @ narrow.T).float().sub_(log_chance)
            own, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            partition = logits.sub_(top).exp_().sum(1, keepdim=True)
            total += (top + partition.log() - own).sum()
            logits.div_(partition).scatter_add_(1, target, torch.full_like(own, -1.0))
            grad = logits.to(kind)
            user_grad[start : start + 512] = (grad @ narrow).float()
            wide += (grad.T @ part).float()
        ctx.save_for_backward(user_grad / len(users), wide / len(users))
        return total / len(users)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        user_grad, item_grad = ctx.saved_tensors
        return grad * user_grad, grad * item_grad, None, None, None


class RowAdam:
    """Runs Adam on rows that a batch touched; one second moment a row: 1 + 1/D tables of state, not 2."""

    def __init__(self, table: Tensor):
        self.table, self.steps = table, 0
        self.first, self.second = torch.zeros_like(table), torch.zeros(len(table), 1)

    def step(self, rows: Tensor, grad: Tensor, learning_rate: float) -> None:
        """Takes a step on rows [n] int64 (no repeats) by their gradients [n, D]."""
        self.steps += 1
        first = 0.9 * self.first[rows] + 0.1 * grad
        second = 0.999 * self.second[rows] + 0.001 * grad.square().mean(1, keepdim=True)
        self.first[rows], self.second[rows] = first, second
        scale = (second / (1 - 0.999**self.steps)).sqrt() + 1e-8
        self.table[rows] -= learning_rate / (1 - 0.9**self.steps) * first / scale

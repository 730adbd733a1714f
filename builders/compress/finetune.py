"""Has one short training loop for all that changes a trained module: pruning, distilling, quantizing.

Feeds are dicts by contract tensor name, first axis users; what a loss wants beside the module's inputs
(labels, items) lies in the same dict under names that no input has. All random numbers come from `seed`: the
same seed gives the same weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from builders.progress import Progress
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

Feeds = dict[str, Tensor]
Batches = Callable[[np.random.Generator], Feeds]  # draws one batch with the given random numbers
Loss = Callable[
    [nn.Module, Feeds], Tensor
]  # the module as it is now and a batch -> what shall fall, a scalar
_SHOWN = 20  # times that progress is told of one training
_CLIP = 5.0  # largest norm of the gradients of one step


class Repair(Protocol):
    """Puts back what a step of the optimizer undoes, such as Masks."""

    def apply(self) -> None:
        """Puts it back."""


def finetune(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    repairs: tuple[Repair, ...] = (),
    dropout: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """Trains `module` in place: Adam, learning rate falling linearly to 0. Returns the loss of every step.

    `repairs` are applied after each step. Dropout is off unless wanted: a teacher's answer is no noisy label.
    Whatever mode the module was in, it is in evaluation mode afterwards.
    """
    if steps < 1:
        raise InvalidInput(f"steps = {steps}: want at least 1")
    if not learning_rate > 0:
        raise InvalidInput(f"learning_rate = {learning_rate}: want a number above 0, such as 0.001")
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), lr=learning_rate)
    losses: list[float] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.train(dropout)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            losses.append(_step(module, loss(module, batches(rng)), optimizer))
            for repair in repairs:
                repair.apply()
            if progress and (step + 1) % max(1, steps // _SHOWN) == 0:
                progress(
                    (step + 1) / steps,
                    f"step {step + 1} of {steps}, loss {np.mean(losses[-max(1, steps // _SHOWN) :]):.4g}",
                )
    module.eval()
    return losses


def _step(module: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    if not torch.isfinite(loss):
        raise InvalidInput(
            f"the loss became {float(loss.detach())}: lower learning_rate, or look for NaN in the feeds"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
    optimizer.step()
    return float(loss.detach())


def answers(module: nn.Module, feeds: Feeds) -> Tensor | tuple[Tensor, ...]:
    """Runs the module on those of the feeds that its `forward` names."""
    return module(**inputs_of(module, feeds))


def inputs_of(module: nn.Module, feeds: Feeds) -> Feeds:
    """Picks the feeds that the module's `forward` names; InvalidInput when one is missing."""
    wanted = [
        name
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    missing = [name for name in wanted if name not in feeds]
    if missing:
        raise InvalidInput(
            f"feeds lack {', '.join(missing)}, which {type(module).__name__}.forward takes; they have "
            f"{', '.join(feeds)}"
        )
    return {name: feeds[name] for name in wanted}


def batches_from_feeds(
    feeds: Mapping[str, Array], batch: int, shared: Mapping[str, Array] | None = None
) -> Batches:
    """Batches of `batch` users drawn from arrays whose first axis is users; `shared` arrays go into every
    batch whole."""
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) != 1 or not min(counts.values(), default=0):
        raise InvalidInput(f"feeds: want the same number of users, at least 1, in all; got {counts}")
    if batch < 1:
        raise InvalidInput(f"batch = {batch}: want at least 1 user")
    users = next(iter(counts.values()))
    whole = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (shared or {}).items()}

    def draw(rng: np.random.Generator) -> Feeds:
        chosen = np.sort(rng.choice(users, min(batch, users), replace=False))
        return {name: torch.from_numpy(array[chosen]) for name, array in feeds.items()} | whole

    return draw

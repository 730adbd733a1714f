"""Trains towers so that views of one item, and items that are clicked together, lie beside each other.

The loss is the symmetric contrastive one of CLIP (Radford et al., ICML 2021) with a learned temperature:
among the views of a batch each has to find its own item's other one; and, where a shop has clicks, each item
that it was clicked with, view by view. Half of a batch are drawn items, the other half one companion each: an
item clicked with it, or one of its group, which is hard to tell from it. Equal inputs are no negatives.

Heads are trained first, over frozen vectors; then layers are unfrozen one group after the other, the top one
first, each at a rate 2.6 times below that of the one above (ULMFiT, Howard & Ruder, ACL 2018); where the time
allows few rounds of all, the lower ones stay frozen. The state with
the least loss of the held-out items stays; it may be the start.

Axes: n items, B batch, D components of the space, V those of an encoder.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.content.tuning.figures import pair_figures
from builders.content.tuning.material import Material
from builders.content.tuning.towers import Tower
from builders.progress import Progress
from builders.search.shared_space import Heads
from builders.search.shared_space import train as train_heads
from ensemble.arrays import Array
from ensemble.content.projection import fitted_projection

_BATCH = 128
_RATES = {True: 3e-5, False: 1e-4}  # of the top group, of texts and of pictures
_HEAD_RATE, _DECAY, _SHARPEST = 1e-4, 0.05, 100.0
_BELOW = 2.6  # a group's rate is so much less than that of the one above it
_UNFROZEN_BY = 0.4  # of the training: then all layers learn
_WARM = 0.1  # of the training: rates rise
_TOGETHER = 0.3  # weight of the items that are clicked together
_MOST_ROUNDS = 30
_JUDGED_TIMES = 5
_FEW_ROUNDS = 8  # fewer of all layers gain less than more of the upper ones, which take half the time
_DROPOUT = 0.3  # of heads over frozen vectors, and their rate and decay
_FROZEN_RATE, _FROZEN_DECAY = 2e-3, 0.01


@dataclass(frozen=True)
class Limits:
    """Says how long may be trained, and by which clock: seconds of `clock` from `began`."""

    seconds: float
    steps: int = 0  # at most so many; 0: what the seconds allow
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.monotonic)

    def spent(self) -> float:
        """Gives the share of the seconds that are over."""
        return (self.clock() - self.began) / self.seconds


@dataclass
class Told:
    """Holds what a training says of itself."""

    rounds: float = 0.0  # how often each item was seen
    steps: int = 0
    planned: int = 0
    groups: int = 0  # of layers that learn, from the top
    seconds: float = 0.0
    seconds_a_step: float = 0.0
    best_at: int = 0  # the step whose state stays; 0: the start
    losses: list[tuple[int, float]] = field(default_factory=list)  # of held-out items, by step
    temperature: float = 0.0


class Training:
    """Holds what is trained."""

    def __init__(
        self, towers: list[Tower], material: Material, seed: int, say: Callable[[str], None]
    ) -> None:
        self.towers, self.material, self.say, self.seed = towers, material, say, seed
        self.rng = np.random.default_rng(seed)
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
        self.learns, self.judges = np.flatnonzero(~material.held), np.flatnonzero(material.held)
        self.keys = [torch.from_numpy(view.keys) for view in material.views]
        self._partners = _partners(material)
        self._alike = _members(material.groups, self.learns)

    # --- heads over frozen vectors

    def fit_heads(self, frozen: list[Array], progress: Progress) -> None:
        """Trains the heads over frozen vectors [n, V of each]: of both views of each item, or, of a single
        view, of items clicked together."""
        if len(frozen) == 2:
            pairs = tuple(of[self.learns] for of in frozen)
        else:
            pairs = tuple(frozen[0][column] for column in self.material.together.T)
        means = [of[self.learns].mean(axis=0) for of in frozen]
        spreads = [of[self.learns].std(axis=0) + np.float32(1e-6) for of in frozen]
        if len(frozen) == 1:
            means, spreads = means * 2, spreads * 2
        scaled = [(of - m) / s for of, m, s in zip(pairs, means, spreads, strict=True)]
        maps = [tower.head.map for tower in self.towers]
        both = maps * 2 if len(maps) == 1 else maps
        heads = Heads([nn.Sequential(nn.Dropout(_DROPOUT), one) for one in both])
        pair = scaled[0], scaled[1]
        train_heads(heads, pair, self.seed, rate=_FROZEN_RATE, decay=_FROZEN_DECAY, progress=progress)
        with torch.no_grad():
            self.log_scale.copy_(heads.log_scale)
            for tower, mean, spread in zip(self.towers, means, spreads, strict=False):
                tower.head.mean.copy_(torch.from_numpy(mean))
                tower.head.spread.copy_(torch.from_numpy(spread))

    # --- all of it

    def run(self, limits: Limits, progress: Progress) -> Told:
        """Trains until the limits, keeps the best state in the towers, and tells of it."""
        told = Told()
        optimizer, rates, groups = self._optimizer()
        started = limits.clock()
        told.losses.append((0, self.held_out_loss()))
        judging = limits.clock() - started
        batches = self._batches()
        self._plan(told, limits, judging, batches, groups)
        self._say_plan(told, limits)
        best, every = self._state(), max(1, told.planned // _JUDGED_TIMES)
        before = limits.spent()
        for step in range(1, told.planned + 1):
            in_time = 0.0 if limits.steps else (limits.spent() - before) / max(1e-9, 1 - before)
            share = max((step - 1) / told.planned, in_time)
            if share >= 1:
                break
            _set_rates(optimizer, rates, groups, share, told.groups)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(next(batches))
            loss.backward()
            optimizer.step()
            told.steps = step
            progress(share, f"tuning: step {step:,} of {told.planned:,}, loss {float(loss.detach()):.3f}")
            if step % every == 0:
                best = self._judge(told, step, best)
        if told.steps > told.losses[-1][0]:  # the time may end before the steps do
            best = self._judge(told, told.steps, best)
        self._restore(best)
        told.rounds = round(told.steps * _BATCH / max(1, len(self.learns)), 1)
        told.seconds = round(limits.clock() - started, 1)
        told.temperature = round(float(torch.exp(-self.log_scale.detach())), 4)
        return told

    def held_out_loss(self) -> float:
        """Gives the contrastive loss of the held-out items among each other, as they are served."""
        return self._loss_among(self.places(self.judges), self.judges)

    def places(self, chosen: Array) -> list[Array]:
        """Gives places [k, D] of some items [k] in the space, by view."""
        return [
            tower.encoded(lambda of, view=view: view.read(chosen[list(of)]), len(chosen))  # type: ignore[misc]
            for tower, view in zip(self.towers, self.material.views, strict=True)
        ]

    def figures(self, places: list[Array], chosen: Array) -> dict[str, float]:
        """Gives what pairs of the chosen items [k] are like, of places [k, *] by view: both views of an item,
        or an item and one that it is clicked with."""
        if len(places) == 2:
            return pair_figures(places[0], places[1], ("text", "picture"))
        place = {int(item): at for at, item in enumerate(chosen)}
        pairs = [(a, b) for a, b in self.material.together.tolist() if a in place and b in place]
        ends = np.array([(place[a], place[b]) for a, b in pairs], np.int64).reshape(-1, 2)
        return pair_figures(places[0][ends[:, 0]], places[0][ends[:, 1]], ("item", "clicked with it"))

    def _loss_among(self, places: list[Array], chosen: Array) -> float:
        tensors, items = [torch.from_numpy(of) for of in places], torch.from_numpy(chosen)
        with torch.no_grad():
            return float(_contrast(tensors[0], tensors[-1], self._scale(), self._same(items, items)))

    def _judge(self, told: Told, step: int, best: list[Any]) -> list[Any]:
        """Measures the held-out loss, and gives the state that is best so far."""
        told.losses.append((step, self.held_out_loss()))
        least = min(loss for _, loss in told.losses[:-1])
        self.say(
            f"  step {step:,}: loss of held-out items {told.losses[-1][1]:.4f}, least before {least:.4f}"
        )
        if told.losses[-1][1] >= least:
            return best
        told.best_at = step
        return self._state()

    def _state(self) -> list[Any]:
        states = [
            (copy.deepcopy(t.module.state_dict()), copy.deepcopy(t.head.state_dict())) for t in self.towers
        ]
        return [*states, self.log_scale.detach().clone()]

    def _restore(self, state: list[Any]) -> None:
        for tower, (module, head) in zip(self.towers, state, strict=False):
            tower.module.load_state_dict(module)
            tower.head.load_state_dict(head)
            tower.module.eval()
        with torch.no_grad():
            self.log_scale.copy_(state[-1])

    # --- a step

    def _loss(self, batch: tuple[Array, Array]) -> Tensor:
        """Gives the loss of a batch: items [B], and the pairs [k, 2] among them that are clicked together."""
        items, pairs = batch
        for tower in self.towers:
            tower.train()
        found = [
            tower.vectors(view.read(items.tolist()), self.rng)
            for tower, view in zip(self.towers, self.material.views, strict=True)
        ]
        rows = torch.from_numpy(items)
        loss = torch.zeros(())
        if len(found) == 2:
            loss = _contrast(found[0], found[1], self._scale(), self._same(rows, rows))
        if len(pairs) > 1:
            one, other = torch.from_numpy(pairs).T
            same = self._same(rows[one], rows[other])
            sides = [_contrast(of[one], of[other], self._scale(), same) for of in found]
            loss = loss + (_TOGETHER if len(found) == 2 else 1.0) * torch.stack(sides).mean()
        return loss

    def _scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=_SHARPEST)

    def _same(self, one: Tensor, other: Tensor) -> Tensor:
        """Says which items [B, B] have an equal input off the diagonal: they are no negatives."""
        same = torch.stack([keys[one][:, None] == keys[other][None] for keys in self.keys]).any(0)
        return same & ~torch.eye(len(one), dtype=torch.bool)

    def _batches(self) -> Iterator[tuple[Array, Array]]:
        """Draws batches without end, every item once a round: items [B], and pairs [k, 2] of places in it."""
        half = max(2, min(_BATCH // 2, len(self.learns) // 2))
        while True:
            order = self.rng.permutation(self.drawn())
            for start in range(0, max(1, len(order) - half + 1), half):
                drawn = order[start : start + half]
                yield self._with_companions(drawn)

    def drawn(self) -> Array:
        """Gives the items that batches are made of: all that learn, or, of a single view, those with
        partners."""
        if len(self.towers) == 2:
            return self.learns
        return np.array(sorted(self._partners), np.int64)

    def _with_companions(self, drawn: Array) -> tuple[Array, Array]:
        companions, is_pair = np.empty_like(drawn), np.zeros(len(drawn), bool)
        for at, item in enumerate(drawn.tolist()):
            partners = self._partners.get(item)
            alike = self._alike.get(int(self.material.groups[item]), self.learns)
            is_pair[at] = partners is not None and (len(self.towers) == 1 or self.rng.random() < 0.5)
            companions[at] = self.rng.choice(partners if is_pair[at] and partners is not None else alike)
        places = np.flatnonzero(is_pair)
        return np.concatenate([drawn, companions]), np.stack([places, places + len(drawn)], axis=1)

    # --- the plan

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[float], list[tuple[int, list[nn.Parameter]]]]:
        """Gives the optimizer, its rates at their peak, and the groups of layers with their depth from the
        top, in the order of its parameter groups behind the heads'."""
        heads = [p for tower in self.towers for p in tower.head.map.parameters()]
        parts: list[dict[str, Any]] = [{"params": [*heads, self.log_scale]}]
        rates, groups = [_HEAD_RATE], list[tuple[int, list[nn.Parameter]]]()
        for tower in self.towers:
            for depth, group in enumerate(tower.layers()):
                parts.append({"params": group})
                rates.append(_RATES[tower.is_text] / _BELOW**depth)
                groups.append((depth, group))
        return torch.optim.AdamW(parts, lr=0.0, weight_decay=_DECAY), rates, groups

    def _plan(
        self,
        told: Told,
        limits: Limits,
        judging: float,
        batches: Iterator[Any],
        groups: list[tuple[int, list[nn.Parameter]]],
    ) -> None:
        """Chooses how deep to train: as deep as the time allows _FEW_ROUNDS of, else the top group alone."""
        deepest = 1 + max(depth for depth, _ in groups)
        self._measured(batches, groups, 1, limits.clock)  # the first step of all is slower
        for told.groups in sorted({deepest, max(1, deepest // 2), 1}, reverse=True):
            told.seconds_a_step = self._measured(batches, groups, told.groups, limits.clock)
            told.planned = self._planned(limits, told.seconds_a_step, judging)
            if limits.steps or told.planned * _BATCH >= _FEW_ROUNDS * len(self.learns):
                return

    def _measured(
        self,
        batches: Iterator[Any],
        groups: list[tuple[int, list[nn.Parameter]]],
        learning: int,
        clock: Callable[[], float],
    ) -> float:
        """Gives the seconds of a step in which the upper `learning` groups of layers learn; changes
        nothing."""
        state, rng = torch.random.get_rng_state(), copy.deepcopy(self.rng)
        for depth, group in groups:
            _unfreeze(group, depth < learning)
        begun = clock()
        self._loss(next(batches)).backward()
        seconds = clock() - begun
        for _, group in groups:
            _unfreeze(group, False)
        torch.random.set_rng_state(state)
        self.rng.bit_generator.state = rng.bit_generator.state
        return seconds

    def _planned(self, limits: Limits, seconds_a_step: float, judging: float) -> int:
        most = max(1, _MOST_ROUNDS * len(self.learns) // _BATCH)
        if limits.steps:
            return limits.steps
        left = limits.seconds * (1 - limits.spent()) - _JUDGED_TIMES * judging
        return int(max(0, min(most, left / max(seconds_a_step, 1e-6))))

    def _say_plan(self, told: Told, limits: Limits) -> None:
        minutes = told.planned * told.seconds_a_step / 60
        rounds = told.planned * _BATCH / max(1, len(self.learns))
        self.say(
            f"a step of {_BATCH} items takes {told.seconds_a_step:.2f} s: about {told.planned:,} steps, "
            f"{rounds:.1f} rounds of {len(self.learns):,} items, in {minutes:.0f} minutes, of the upper "
            f"{told.groups} groups of layers; "
            f"{len(self.judges):,} items judge, whose loss is {told.losses[0][1]:.4f} now"
        )


def _contrast(one: Tensor, other: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Gives the symmetric contrastive loss of pairs [B, D]; where `same` [B, B] is true is no negative."""
    logits = (one @ other.T * scale).masked_fill(same, -torch.inf)
    own = torch.arange(len(one))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def _set_rates(
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    groups: list[tuple[int, list[nn.Parameter]]],
    share: float,
    learning: int,
) -> None:
    """Sets the rates at a share of the training: they rise, then fall as a cosine does. Of the upper
    `learning` groups of layers those that are still frozen get no gradient, nor do all below."""
    form = min(1.0, share / _WARM + 0.05) * (1 + np.cos(np.pi * share)) / 2
    for part, rate in zip(optimizer.param_groups, rates, strict=True):
        part["lr"] = rate * form
    for depth, group in groups:
        _unfreeze(group, depth < learning and share >= depth * _UNFROZEN_BY / max(1, learning - 1))


def _unfreeze(group: list[nn.Parameter], learns: bool) -> None:
    for parameter in group:
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None


def _partners(material: Material) -> dict[int, Array]:
    """Lists by item those that it was clicked together with, of items that learn."""
    found: dict[int, list[int]] = {}
    for one, other in material.together.tolist():
        if not material.held[one] and not material.held[other]:
            found.setdefault(one, []).append(other)
            found.setdefault(other, []).append(one)
    return {item: np.array(others, np.int64) for item, others in found.items()}


def _members(groups: Array, learns: Array) -> dict[int, Array]:
    """Lists the items that learn by their group; none of group -1, which is none."""
    order = learns[np.argsort(groups[learns], kind="stable")]
    names, starts = np.unique(groups[order], return_index=True)
    return {
        int(name): part for name, part in zip(names, np.split(order, starts[1:]), strict=True) if name >= 0
    }


def frozen_figures(frozen: list[Array], learns: Array, judges: Array) -> dict[str, float]:
    """Gives what pairs of held-out items are like by the components that rows hold of both encoders [n, V of
    each], which share no space."""
    width = min(128, *(of.shape[1] for of in frozen))
    parts = [
        fitted_projection(of[learns], width).values(of[judges], np.ones(len(judges), bool))[:, :-1]
        for of in frozen
    ]
    least = min(part.shape[1] for part in parts)
    return pair_figures(parts[0][:, :least], parts[1][:, :least], ("text", "picture"))

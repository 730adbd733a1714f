"""Distils: a smaller module learns from what a trained one answers, not from labels alone.

Losses, each with a weight:
- kd, the teacher's answers: Hinton et al. 2015 "Distilling the knowledge in a neural network", softened by a
  temperature. A ranker's
  tasks are binary, so it is the divergence of each probability, plus that of the softmax over a user's
  candidates, which is the order; an encoder's is that of the softmax over items, plus the relative squared
  distance of the embeddings.
- at, where the teacher looks: Zagoruyko & Komodakis 2017 "Paying more attention to attention": squared
  distance of the attention maps,
  averaged over heads and L2-normalized.
- rd, how samples lie to each other: Park et al. 2019 "Relational knowledge distillation": distances and
  angles between the
  representations of samples, which need not be of equal width.
- hard, the true labels, where the feeds have them.

Axes: B users, N candidates, T tasks, M interests, D embedding, I items, Q queries, K keys, P sampled
representations. Feeds beside a module's inputs: `labels` [B, N, T] (NaN = not defined) of a ranker;
`item_embeddings` [I, D] of an encoder, and `target_items` [B] int64, rows of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from builders.compress.finetune import Batches, Feeds, Loss, answers, finetune, inputs_of
from builders.progress import Progress
from builders.ranker.model import CalibratedRanker, Ranker
from ensemble.errors import InvalidInput

HardLoss = Callable[[Tensor, Tensor], Tensor]  # logits, labels -> scalar, as in builders.ranker.loss
_SAMPLES = 48  # representations whose relations are compared: 48 distances squared, 48 angles cubed
_ANGLES = 2.0  # weight of angles beside distances, as in the paper


@dataclass(frozen=True)
class DistilLosses:
    """Weights of the losses; 0 = not computed."""

    kd: float = 1.0  # logits
    at: float = 0.0  # attention
    rd: float = 0.0  # relations
    hard: float = 0.0  # labels
    temperature: float = 2.0  # of kd's softmax and sigmoid

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf") or (field.name == "temperature" and value == 0):
                raise InvalidInput(
                    f"{field.name} = {value}: want a number "
                    f"{'above 0' if field.name == 'temperature' else 'from 0 up'}"
                )
        if not self.kd + self.at + self.rd + self.hard:
            raise InvalidInput(
                "kd, at, rd and hard are all 0: the student would learn nothing; give one of them a weight"
            )

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> DistilLosses:
        """Losses by name, those not named 0; InvalidInput for a name that is none."""
        known = [field.name for field in fields(cls)]
        for name, value in weights.items():
            if name not in known:
                raise InvalidInput(f"loss {name} = {value}: there is no such loss; known: {', '.join(known)}")
        return cls(**{"kd": 0.0, **weights})


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    losses: DistilLosses | None = None,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    hard_loss: HardLoss | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Trains `student` in place from `teacher`, which stays as it is, and returns it in evaluation mode.

    `hard_loss` is the training's own loss of logits and labels (builders.ranker.loss); without it each
    label's log loss.
    """
    loss = distil_loss(teacher, losses or DistilLosses(), hard_loss)
    finetune(student, loss, batches, steps=steps, learning_rate=learning_rate, seed=seed, progress=progress)
    return student.eval()


def distil_loss(teacher: nn.Module, losses: DistilLosses, hard_loss: HardLoss | None = None) -> Loss:
    """Gives the weighted sum as a Loss for `finetune`.

    After pruning and in QAT the teacher is the module as it was before.
    """
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def loss(student: nn.Module, feeds: Feeds) -> Tensor:
        parts = loss_parts(teacher, student, feeds, losses, hard_loss)
        return torch.stack([getattr(losses, name) * value for name, value in parts.items()]).sum()

    return loss


def loss_parts(
    teacher: nn.Module,
    student: nn.Module,
    feeds: Feeds,
    losses: DistilLosses,
    hard_loss: HardLoss | None = None,
) -> dict[str, Tensor]:
    """Computes each loss that has a weight, without the weight: scalars by name."""
    with torch.no_grad():
        wanted = _look(teacher, feeds, losses)
    found = _look(student, feeds, losses)
    parts: dict[str, Tensor] = {}
    if losses.kd:
        parts["kd"] = _kd(teacher, wanted, found, feeds, losses.temperature)
    if losses.at:
        parts["at"] = attention_loss(wanted.maps, found.maps)
    if losses.rd:
        parts["rd"] = relation_loss(wanted.representation, found.representation)
    if losses.hard:
        parts["hard"] = _hard(student, found, feeds, hard_loss)
    return parts


def attention_loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """Maps [B, heads, Q, K] of every layer -> mean squared distance of the L2-normalized rows; layers are
    paired evenly, last with last."""
    if not teacher or not student:
        raise InvalidInput(
            "at: teacher or student shows no attention map (a softmax over [B, heads, queries, keys]); set "
            "at = 0"
        )
    total = torch.zeros(())
    for place, found in enumerate(student):
        wanted = teacher[
            (place + 1) * len(teacher) // len(student) - 1
            if len(teacher) >= len(student)
            else min(place, len(teacher) - 1)
        ]
        rows = [functional.normalize(one.mean(1), dim=-1) for one in (wanted, found)]
        total = total + (rows[0] - rows[1]).square().sum(-1).mean()
    return total / len(student)


def relation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Representations [P, any width] of the same samples -> Huber loss of their distances and of the angles
    of all triples."""
    every = max(1, len(teacher) // _SAMPLES)
    pairs = [one[::every][:_SAMPLES] for one in (teacher, student)]
    distances, angles = zip(*(_relations(one) for one in pairs), strict=True)
    return functional.smooth_l1_loss(distances[1], distances[0]) + _ANGLES * functional.smooth_l1_loss(
        angles[1], angles[0]
    )


def _relations(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Gives distances [P, P] as multiples of their mean, and cosines [P, P, P], of samples [P, W].

    A cosine is that of the angle at the first sample.
    """
    steps = samples[None] - samples[:, None]
    squares = steps.square().sum(-1)
    distances = (squares + 1e-12).sqrt()  # the square root of 0 has no gradient
    others = squares > 1e-12
    mean = distances[others].mean() if bool(others.any()) else torch.ones(())
    unit = steps / distances.unsqueeze(-1)
    return distances / mean, unit @ unit.transpose(1, 2)


# --- what is looked at


@dataclass
class _Look:
    """Holds what one module shows of one batch."""

    outputs: list[Tensor]  # a ranker's logits after calibration [B, N, T], or its outputs
    maps: list[Tensor]  # attention maps [B, heads, Q, K]
    representation: Tensor  # [P, width] of one sample each; empty where rd has no weight


class _AttentionMaps(TorchFunctionMode):
    """Collects the results of every softmax over four axes: whose module it is does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") == "softmax" and out.ndim == 4:
            self.maps.append(out)
        return out


def _look(module: nn.Module, feeds: Feeds, losses: DistilLosses) -> _Look:
    attention = _AttentionMaps()
    with _representation(module if losses.rd else None) as inside, attention:
        if isinstance(module, CalibratedRanker):
            logits = module.logits(*inputs_of(module, feeds).values())
            outputs = [logits * module.calibration_scale + module.calibration_bias]
        else:
            given = answers(module, feeds)
            outputs = [given] if isinstance(given, Tensor) else list(given)
    kept = inside[-1] if inside else outputs[0]
    return _Look(outputs, attention.maps, kept.flatten(0, -2) if losses.rd else torch.zeros(0))


@contextmanager
def _representation(module: nn.Module | None) -> Any:
    """Collects what a ranker knows of each candidate: the layer before a task's last one. An encoder's is its
    output."""
    inside: list[Tensor] = []
    handle = None
    if isinstance(module, CalibratedRanker):
        layers = [part for _, part in module.named_modules() if isinstance(part, nn.Linear)]
        watched = module.get_submodule("towers.0.1") if isinstance(module, Ranker) else layers[-1]
        handle = watched.register_forward_pre_hook(lambda part, arguments: inside.append(arguments[0]))
    try:
        yield inside
    finally:
        if handle:
            handle.remove()


# --- the losses


def _kd(teacher: nn.Module, wanted: _Look, found: _Look, feeds: Feeds, temperature: float) -> Tensor:
    if isinstance(teacher, CalibratedRanker):
        return _ranker_kd(
            wanted.outputs[0], found.outputs[0], teacher.is_binary, _present(feeds), temperature
        )
    parts = [
        _embedding_kd(one, other, feeds, temperature)
        for one, other in zip(wanted.outputs, found.outputs, strict=True)
    ]
    return torch.stack(parts).sum()


def _ranker_kd(
    teacher: Tensor, student: Tensor, is_binary: Tensor, present: Tensor | None, temperature: float
) -> Tensor:
    """Logits [B, N, T], present [B, N] bool (None: all): binary and list divergence of binary tasks, squared
    error of numbers."""
    known = torch.ones(teacher.shape[:2], dtype=torch.bool) if present is None else present
    far = torch.where(known, 0.0, -1e4).unsqueeze(-1)
    total = torch.zeros(())
    if bool(is_binary.any()):
        soft, own = (logits[..., is_binary] / temperature for logits in (teacher, student))
        each = functional.binary_cross_entropy_with_logits(own, soft.sigmoid(), reduction="none")
        each = each - functional.binary_cross_entropy_with_logits(soft, soft.sigmoid(), reduction="none")
        lists = _divergence((soft + far).transpose(1, 2), (own + far).transpose(1, 2))
        total = temperature**2 * (each[known].sum(-1).mean() + lists.sum(-1).mean())
    if not bool(is_binary.all()):
        numbers, guessed = teacher[..., ~is_binary][known], student[..., ~is_binary][known]
        total = total + ((guessed - numbers).square() / numbers.var(0).clamp(min=1e-6)).sum(-1).mean()
    return total


def _embedding_kd(teacher: Tensor, student: Tensor, feeds: Feeds, temperature: float) -> Tensor:
    """Embeddings [B, M, D] or [B, D]: divergence of their softmax over items (the batch's own, where none are
    fed), and their distance."""
    width = teacher.shape[-1]
    items = feeds.get("item_embeddings")
    items = items if items is not None and items.shape[-1] == width else teacher.reshape(-1, width)
    order = _divergence(teacher @ items.T / temperature, student @ items.T / temperature).mean()
    match = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
    return temperature**2 * order + match.mean()


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Logits [..., K] -> KL(softmax of teacher || softmax of student) [...]."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)


def _hard(student: nn.Module, found: _Look, feeds: Feeds, hard_loss: HardLoss | None) -> Tensor:
    if isinstance(student, CalibratedRanker) and "labels" in feeds:
        raw = (found.outputs[0] - student.calibration_bias) / student.calibration_scale
        return (hard_loss or _log_loss(student.is_binary))(raw, feeds["labels"])
    if "target_items" in feeds and "item_embeddings" in feeds:
        logits = (found.outputs[0] @ feeds["item_embeddings"].T).flatten(1, -2).amax(1)
        return functional.cross_entropy(logits, feeds["target_items"])
    raise InvalidInput(
        "hard > 0 needs labels: feed `labels` to a ranker, `item_embeddings` and `target_items` to an "
        "encoder; or set hard = 0"
    )


def _log_loss(is_binary: Tensor) -> HardLoss:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        binary = known & is_binary
        log_loss = functional.binary_cross_entropy_with_logits(
            logits[binary], labels[binary], reduction="sum"
        )
        squares = (logits - labels)[known & ~is_binary].square().sum()
        return (log_loss + squares) / known.sum().clamp(min=1)

    return loss


def _present(feeds: Feeds) -> Tensor | None:
    """Tells which candidates [B, N] are no padding: a padded one is 0 in all its tensors."""
    found = [
        tensor.flatten(2).ne(0).any(2) for name, tensor in feeds.items() if name.startswith("candidate_")
    ]
    return torch.stack(found).any(0) if found else None

"""Compares what teaches a student best: the same student, taught by one loss or another.

The losses are of the teacher's logits (kd), attention (at) and relations (rd), alone and together; their
sources are in builders/compress/distil/distil.py. Start and batches are the same for all; there are a few
seeds, since one says little. Held-out users who chose nothing judge; the test users stay the gate's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from builders.compare.models import SETUP, check_model
from builders.compress import graph
from builders.compress.distil.distil import DistilLosses, distil
from builders.compress.distil.students import encoder_sizes
from builders.compress.judge.evaluation import Evaluation
from builders.compress.judge.judge import Judge, compare
from builders.compress.shrink import exported, student_of, training_batches
from builders.compress.source import Source
from builders.encoders.models import UserEncoder
from builders.index.staged import StagedRelease
from builders.progress import Progress, part_of
from ensemble.errors import InvalidInput

_LITTLE = 0.1  # of kd's weight: enough to tell the answers, which neither attention nor relations do


@dataclass(frozen=True)
class LossRow:
    """Students taught by one choice of losses, one a seed."""

    name: str
    weights: dict[str, float]  # empty: the student as it starts
    ndcg: tuple[float, ...]  # NDCG@10 as a share of the teacher's
    overlap: tuple[float, ...]  # of the shown items with the teacher's
    train_s: tuple[float, ...]  # CPU seconds of the training process
    user_error: float  # standard error over users of `ndcg`, mean over seeds


@dataclass(frozen=True)
class LossTable:
    """Holds all losses at one student size."""

    shop: str
    model: str
    student: dict[str, Any]
    parameters: int
    teacher_parameters: int
    teacher_ndcg: float
    users: int
    steps: int
    learning_rate: float
    seeds: tuple[int, ...]
    rows: tuple[LossRow, ...]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Gives the mean and its standard error, which is None of a single value."""
    found = np.asarray(values, np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None


def compare_losses(
    source: Source,
    model: str,
    *,
    student: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
    only: Sequence[str] = (),
    steps: int,
    seeds: Sequence[int],
    learning_rate: float = 1e-3,
    users: int,
    progress: Progress,
) -> LossTable:
    """Trains one student of `model` a seed and choice of losses, and judges each. `student`: sizes, by
    default half the teacher's; `weights`: of kd, at and rd in every row that has them, by default 1; `only`:
    names of rows, by default all.
    """
    check_model(source, model)
    choices = _choices({"kd": 1.0, "at": 1.0, "rd": 1.0, **(weights or {})}, only)
    sizes = dict(student or _half(source, model))
    progress(0.0, "users that teach and users that judge")
    evaluation = Evaluation(source.dataset, source.folder)
    judge, batches = evaluation.judge(model, users), training_batches(source, model, evaluation)
    contest = _Contest(
        source,
        model,
        sizes,
        evaluation,
        judge,
        functools.partial(distil, batches=batches, steps=steps, learning_rate=learning_rate),
    )
    rows = []
    for place, (name, chosen) in enumerate(choices.items()):
        start, end = (SETUP + (1 - SETUP) * at / len(choices) for at in (place, place + 1))
        rows.append(contest.row(name, chosen, seeds, part_of(progress, start, end, f"{name}: ")))
    reference = (
        graph.parameters(contest.teacher),
        float(contest.wanted.gains.mean()),
        len(contest.wanted.gains),
    )
    shop = source.dataset.schema.shop
    return LossTable(
        shop, model, sizes, contest.parameters, *reference, steps, learning_rate, tuple(seeds), tuple(rows)
    )


def _choices(weights: Mapping[str, float], only: Sequence[str]) -> dict[str, dict[str, float]]:
    """Gives name -> weights of the losses.

    Attention and relations alone do not tell the answers, so two rows have a little kd with them.
    """
    kd, little = weights["kd"], _LITTLE * weights["kd"]
    parts = {"at": weights["at"], "rd": weights["rd"]}
    found: dict[str, dict[str, float]] = {"untrained": {}, "kd": {"kd": kd}}
    found |= {name: {name: weight} for name, weight in parts.items()}
    found |= {f"{name} + {_LITTLE:g} kd": {name: weight, "kd": little} for name, weight in parts.items()}
    found |= {f"kd + {name}": {name: weight, "kd": kd} for name, weight in parts.items()}
    found |= {"kd + at + rd": {"kd": kd, **parts}}
    for name in only:
        if name not in found:
            raise InvalidInput(f"--only {name}: there is no such row; rows: {', '.join(found)}")
    return {name: chosen for name, chosen in found.items() if not only or name in only}


class _Contest:
    """Holds what all students share: teacher, size, judges.

    `train` is distil with its batches, steps and learning rate.
    """

    def __init__(
        self,
        source: Source,
        model: str,
        sizes: dict[str, Any],
        evaluation: Evaluation,
        judge: Judge,
        train: Callable[..., nn.Module],
    ) -> None:
        self.source, self.model, self.sizes = source, model, sizes
        self.evaluation, self.judge, self.train = evaluation, judge, train
        self.teacher = StagedRelease(source.folder).member_file(model, "model.onnx").read_bytes()
        self.wanted = judge(self.teacher)
        self.parameters = 0  # of a student
        self.first: tuple[nn.Module, bytes] | None = None  # the first student and its engine

    def row(self, name: str, weights: dict[str, float], seeds: Sequence[int], progress: Progress) -> LossRow:
        """Trains one student a seed, and judges each against the teacher."""
        found = []
        for place, seed in enumerate(seeds):
            within = part_of(progress, place / len(seeds), (place + 1) / len(seeds), f"seed {seed}, ")
            start = time.process_time()
            student = self._trained(weights, seed, within)
            spent = time.process_time() - start
            engine = exported(self.source, self.model, student, self.evaluation, self.first)
            self.first = self.first or (student, engine)
            self.parameters = graph.parameters(engine)
            loss = compare(self.wanted, self.judge(engine))
            found.append((1 - loss.relative, loss.overlap, spent, loss.error))
        ndcg, overlap, train_s, errors = zip(*found, strict=True)
        return LossRow(name, weights, ndcg, overlap, train_s, float(np.mean(errors)))

    def _trained(self, weights: dict[str, float], seed: int, progress: Progress) -> nn.Module:
        student = student_of(self.source, self.model, self.sizes, seed)
        if not weights:
            return student
        return self.train(
            self.source.modules[self.model],
            student,
            losses=DistilLosses.of(weights),
            seed=seed,
            progress=progress,
        )


def _half(source: Source, model: str) -> dict[str, Any]:
    """Halves the teacher's inner sizes; what holds for that student holds for others too, only less so."""
    teacher = source.modules[model]
    if isinstance(teacher, UserEncoder):
        whole = encoder_sizes(teacher)
        return {**whole, "layers": max(1, whole["layers"] // 2), "feed": whole["feed"] // 2}
    c = source.ranker_config
    halves = {name: getattr(c, name) // 2 for name in ("hidden", "tower", "products")}
    # attention too: of the teacher's width it would be copied whole, and the loss of attention would have
    # nothing to teach
    return {
        **halves,
        "attention": max(1, c.attention // 2 // c.heads) * c.heads,
        "expert": tuple(width // 2 for width in c.expert),
    }

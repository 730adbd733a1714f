"""Two comparisons that decide how a release is compressed, on the finished stages of a build: `peregrine
compare`.

losses: the same student, from the same start, on the same batches, taught by the teacher's logits (kd),
attention (at) and relations (rd), alone and together (sources: builders/compress/distil/distil.py); a few
seeds, since one says little. plans: the planner's choice of blocks at several sizes beside plain 8 bits,
largest blocks first, at the same size.

Both are judged by held-out users who chose nothing; the test users stay the gate's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from builders.compress import graph
from builders.compress.distil.distil import DistilLosses, distil
from builders.compress.distil.students import encoder_sizes
from builders.compress.judge.evaluate import Evaluation
from builders.compress.judge.judge import Judge, compare
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.planner import Search, Variant, global_8bit
from builders.compress.shrink import exported, student_of, training_batches
from builders.compress.source import Source
from builders.encoders.models import UserEncoder
from builders.index.staged import StagedRelease
from builders.ranker.model import Ranker
from builders.stages import Report
from ensemble.errors import InvalidInput

MODELS = ("ranker", "user_encoder")
_LITTLE = 0.1  # of kd's weight: enough to tell the answers, which neither attention nor relations do
_SETUP = 0.05  # share of the whole before the first row


# --- losses


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
    """All losses at one student size."""

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
    """The mean and its standard error; None of a single value."""
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
    report: Report,
) -> LossTable:
    """Trains one student of `model` a seed and choice of losses, and judges each. `student`: sizes, by
    default half the teacher's; `weights`: of kd, at and rd in every row that has them, by default 1; `only`:
    names of rows, by default all.
    """
    _check(source, model)
    choices = _choices({"kd": 1.0, "at": 1.0, "rd": 1.0, **(weights or {})}, only)
    sizes = dict(student or _half(source, model))
    report(0.0, "users that teach and users that judge")
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

        def told(share: float, text: str, place: int = place, name: str = name) -> None:
            report(_SETUP + (1 - _SETUP) * (place + share) / len(choices), f"{name}: {text}")

        rows.append(contest.row(name, chosen, seeds, told))
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
    """Name -> weights of the losses. Attention and relations alone do not tell the answers, so two rows have
    a little kd with them."""
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
    """What all students share: teacher, size, judges; `train` is distil with its batches, steps and learning
    rate."""

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

    def row(self, name: str, weights: dict[str, float], seeds: Sequence[int], report: Report) -> LossRow:
        """One student a seed, each judged against the teacher."""
        found = []
        for place, seed in enumerate(seeds):

            def told(share: float, text: str, place: int = place, seed: int = seed) -> None:
                report((place + share) / len(seeds), f"seed {seed}, {text}")

            start = time.process_time()
            student = self._trained(weights, seed, told)
            spent = time.process_time() - start
            engine = exported(self.source, self.model, student, self.evaluation)
            self.parameters = graph.parameters(engine)
            loss = compare(self.wanted, self.judge(engine))
            found.append((1 - loss.relative, loss.overlap, spent, loss.error))
        ndcg, overlap, train_s, errors = zip(*found, strict=True)
        return LossRow(name, weights, ndcg, overlap, train_s, float(np.mean(errors)))

    def _trained(self, weights: dict[str, float], seed: int, report: Report) -> nn.Module:
        student = student_of(self.source, self.model, self.sizes, seed)
        if not weights:
            return student
        return self.train(
            self.source.modules[self.model],
            student,
            losses=DistilLosses.of(weights),
            seed=seed,
            progress=report,
        )


def _half(source: Source, model: str) -> dict[str, Any]:
    """Half the teacher's inner sizes; what is said of them holds for any other student too, only less so."""
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


# --- plans


@dataclass(frozen=True)
class PlanPoint:
    """One engine: a point of the plot."""

    family: str  # uncompressed | planner | global
    target: float | None  # the size that was asked for, as a share of fp32's; None = none was
    size: float  # bytes as a share of the fp32 engine's
    latency: float | None  # time of 8 users as a share of fp32's; None: this machine cannot run the runtime
    changed: float  # share of the shown items that are others
    loss: float  # relative NDCG@10 lost
    loss_error: float  # its paired standard error over users
    low: int  # blocks below the highest precision


@dataclass(frozen=True)
class PlanTable:
    """The planner beside global 8 bits on one model and runtime."""

    shop: str
    model: str
    runtime: str
    users: int
    bytes: int  # of the fp32 engine
    blocks: int
    points: tuple[PlanPoint, ...]
    notes: tuple[str, ...]

    def pairs(self) -> list[tuple[PlanPoint, PlanPoint]]:
        """(planner, global 8 bits) at each target."""
        by = {(point.family, point.target): point for point in self.points}
        return [(point, by["global", point.target]) for point in self.points if point.family == "planner"]


def compare_plans(
    source: Source,
    model: str,
    *,
    runtime: str,
    sizes: Sequence[float],
    users: int,
    calibration_users: int,
    report: Report,
) -> PlanTable:
    """The planner at each of `sizes` (shares of fp32's bytes), and 8 bits, largest blocks first, down to what
    the planner reached.

    Each block is measured alone once, for all sizes. A size that cannot be reached is a note; InvalidInput
    when none can.
    """
    _check(source, model)
    report(0.0, "users that calibrate and users that judge")
    evaluation = Evaluation(source.dataset, source.folder)
    engine = StagedRelease(source.folder).member_file(model, "model.onnx").read_bytes()
    judge = functools.cache(evaluation.judge(model, users))
    feeds = evaluation.feeds(model, min(calibration_users, evaluation.most(model)))
    ranges = calibrate(engine, feeds, min_users=1)
    search = Search(engine, feeds, judge, ranges, runtime, (), {})
    search.measure(lambda share, text: report(_SETUP + 0.6 * share, text))
    points, notes = (
        [PlanPoint("uncompressed", None, 1.0, None if runtime == "tensorrt" else 1.0, 0.0, 0.0, 0.0, 0)],
        [],
    )
    for place, target in enumerate(sorted(sizes)):
        report(_SETUP + 0.6 + 0.3 * place / len(sizes), f"size {target:.0%}")
        try:
            planned = search.tried(search.within_size(target), "planner")
        except InvalidInput as error:
            notes.append(str(error))
            continue
        plain = global_8bit(engine, judge, ranges, runtime=runtime, feeds=feeds, size=planned.size)
        points += [_point("planner", target, planned, search), _point("global", target, plain, search)]
    if len(points) == 1:
        raise InvalidInput(notes[0])
    report(0.97, "everything at 8 bits")
    points.append(
        _point("global", None, global_8bit(engine, judge, ranges, runtime=runtime, feeds=feeds), search)
    )
    judged = len(search.uncompressed.gains)
    return PlanTable(
        source.dataset.schema.shop,
        model,
        runtime,
        judged,
        len(engine),
        len(search.blocks),
        tuple(points),
        (*search.notes, *notes),
    )


def _point(family: str, target: float | None, tried: Variant, search: Search) -> PlanPoint:
    loss, low = (
        tried.loss,
        sum(precision != search.highest[name] for name, precision in tried.precisions.items()),
    )
    return PlanPoint(
        family, target, tried.size, tried.latency, 1 - loss.overlap, loss.relative, loss.error, low
    )


# --- both


def _check(source: Source, model: str) -> None:
    """InvalidInput for a model that has nothing to compare."""
    if model not in MODELS:
        raise InvalidInput(f"--model {model}: unknown; known: {', '.join(MODELS)}")
    ranker = source.modules[model]
    if isinstance(ranker, Ranker) and not float(ranker.deep_gate):
        raise InvalidInput(
            "the ranker of this build is recall's own order: its network did not help held-out users and is "
            "off, so nothing in it can be "
            "lost; cure: --model user_encoder, or more interactions"
        )

"""Compares precisions: the planner's choice at several sizes beside plain 8 bits at the same size.

Plain 8 bits puts the largest blocks down first. Held-out users who chose nothing judge; the test users stay
the gate's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from builders.compare.models import SETUP, check_model
from builders.compress.judge.evaluation import Evaluation
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.planner import Search, Trial, global_8bit
from builders.compress.source import Source
from builders.index.staged import StagedRelease
from builders.progress import Progress
from ensemble.errors import InvalidInput


@dataclass(frozen=True)
class PrecisionsPoint:
    """Holds one engine: a point of the plot."""

    family: str  # uncompressed | planner | global
    target: float | None  # the size that was asked for, as a share of fp32's; None = none was
    size: float  # bytes as a share of the fp32 engine's
    latency: float | None  # time of 8 users as a share of fp32's; None: this machine cannot run the runtime
    changed: float  # share of the shown items that are others
    loss: float  # relative NDCG@10 lost
    loss_error: float  # its paired standard error over users
    low: int  # blocks below the highest precision


@dataclass(frozen=True)
class PrecisionsTable:
    """Holds the planner's engines beside global 8 bits, on one model and runtime."""

    shop: str
    model: str
    runtime: str
    users: int
    bytes: int  # of the fp32 engine
    blocks: int
    points: tuple[PrecisionsPoint, ...]
    notes: tuple[str, ...]

    def pairs(self) -> list[tuple[PrecisionsPoint, PrecisionsPoint]]:
        """Gives (planner, global 8 bits) at each target."""
        by = {(point.family, point.target): point for point in self.points}
        return [(point, by["global", point.target]) for point in self.points if point.family == "planner"]


def compare_precisions(
    source: Source,
    model: str,
    *,
    runtime: str,
    sizes: Sequence[float],
    users: int,
    calibration_users: int,
    progress: Progress,
) -> PrecisionsTable:
    """Compares the planner's engine at each of `sizes` (shares of fp32's bytes) with plain 8 bits.

    Plain 8 bits lowers the largest blocks first, down to the size that the planner reached.

    Each block is measured alone once, for all sizes. A size that cannot be reached is a note; InvalidInput
    when none can.
    """
    check_model(source, model)
    progress(0.0, "users that calibrate and users that judge")
    evaluation = Evaluation(source.dataset, source.folder)
    engine = StagedRelease(source.folder).member_file(model, "model.onnx").read_bytes()
    judge = functools.cache(evaluation.judge(model, users))
    feeds = evaluation.feeds(model, min(calibration_users, evaluation.most(model)))
    ranges = calibrate(engine, feeds, min_users=1)
    search = Search(engine, feeds, judge, ranges, runtime, (), {})
    search.measure(lambda share, text: progress(SETUP + 0.6 * share, text))
    points, notes = (
        [
            PrecisionsPoint(
                "uncompressed", None, 1.0, None if runtime == "tensorrt" else 1.0, 0.0, 0.0, 0.0, 0
            )
        ],
        [],
    )
    for place, target in enumerate(sorted(sizes)):
        progress(SETUP + 0.6 + 0.3 * place / len(sizes), f"size {target:.0%}")
        try:
            planned = search.trial(search.within_size(target), "planner")
        except InvalidInput as error:
            notes.append(str(error))
            continue
        plain = global_8bit(engine, judge, ranges, runtime=runtime, feeds=feeds, size=planned.size)
        points += [_point("planner", target, planned, search), _point("global", target, plain, search)]
    if len(points) == 1:
        raise InvalidInput(notes[0])
    progress(0.97, "everything at 8 bits")
    points.append(
        _point("global", None, global_8bit(engine, judge, ranges, runtime=runtime, feeds=feeds), search)
    )
    judged = len(search.uncompressed.gains)
    return PrecisionsTable(
        source.dataset.schema.shop,
        model,
        runtime,
        judged,
        len(engine),
        len(search.blocks),
        tuple(points),
        (*search.notes, *notes),
    )


def _point(family: str, target: float | None, trial: Trial, search: Search) -> PrecisionsPoint:
    loss, low = (
        trial.loss,
        sum(precision != search.highest[name] for name, precision in trial.precisions.items()),
    )
    return PrecisionsPoint(
        family, target, trial.size, trial.latency, 1 - loss.overlap, loss.relative, loss.error, low
    )

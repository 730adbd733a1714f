"""The ONNX side of one model's compression: a precision for every node, on one runtime, and QAT where rounding alone costs too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builders.compress.calibration import calibrate
from builders.compress.evaluate import Evaluation
from builders.compress.plan import CompressionPlan, Quantize
from builders.compress.planner import Plan, global_8bit, plan_precisions
from builders.compress.qat import qat
from builders.compress.report import NodePrecision, Variant, nodes_of, uncompressed, variant_of, variants_of
from builders.compress.sensitivity import compare
from builders.compress.shrink import Shrunk, exported
from builders.stages import Report
from ensemble.arrays import Tensors
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from builders.compress.stage import Source

_CALIBRATION_USERS = 128  # unless the plan says; more hardly move the ranges


@dataclass(frozen=True)
class Choice:
    """The engine of one runtime, and how it was found."""

    model: bytes
    variants: list[Variant]
    nodes: list[NodePrecision]
    notes: list[str]


def choose_precisions(
    source: Source, model: str, shrunk: Shrunk, plan: CompressionPlan, runtime: str, evaluation: Evaluation, report: Report
) -> Choice:
    """The planner's engine, or that of a fine-tuned module where rounding would lose more than the plan allows."""
    wanted = plan.of(model).quantize
    assert wanted is not None
    feeds = evaluation.feeds(model, plan.calibration_users or min(_CALIBRATION_USERS, evaluation.most(model)))
    found = _planned(shrunk.model, feeds, shrunk, plan, wanted, runtime, lambda share, text: report(0.5 + share / 4, f"{runtime}, {text}"))
    variants, notes = variants_of(model, found, shrunk.model, shrunk.ms), [f"{model} on {runtime}: {note}" for note in found.notes]
    if wanted.qat == "auto" and _is_held_back(found, wanted):
        report(0.75, f"{runtime}, fine-tuning under rounding")
        tuned = _fine_tuned(source, model, shrunk, found, feeds, evaluation, wanted, plan, runtime)
        notes.append(tuned.note)
        if tuned.plan is not None:
            found, variants = tuned.plan, [*_not_chosen(variants), *_as_qat(variants_of(model, tuned.plan, shrunk.model, shrunk.ms))]
    variants.append(_global(model, shrunk, feeds, runtime, found.chosen.size))
    whole = uncompressed(model, runtime, shrunk.reference, shrunk.reference_ms if runtime == "onnxruntime" else None)
    tried = [_against_uncompressed(variant, shrunk) for variant in variants]
    return Choice(found.model, [whole, *tried], nodes_of(model, found), notes)


def _planned(model: bytes, feeds: Tensors, shrunk: Shrunk, plan: CompressionPlan, wanted: Quantize, runtime: str, report: Report) -> Plan:
    candidates = wanted.onnxruntime if runtime == "onnxruntime" else wanted.tensorrt
    budget: dict[str, Any] = {"max_loss": wanted.budget.loss, "target_size": wanted.budget.size, "target_latency": wanted.budget.latency}
    if runtime == "tensorrt" and wanted.budget.latency is not None:
        budget = {"max_loss": plan.gate.ranking / 2}  # no GPU here to time it on: half of what the gate lets pass
    pinned = {node: precision for node, precision in wanted.pinned.items() if runtime == "tensorrt" or precision in ("int8", "fp32")}
    overlap = plan.gate.overlap if plan.keeps_weights else 0.0
    users = len(next(iter(feeds.values())))
    return plan_precisions(
        model,
        feeds,
        shrunk.judge,
        runtime=runtime,
        candidates=candidates,
        min_overlap=overlap,
        pinned=pinned,
        min_users=users,
        progress=report,
        **budget,
    )


# --- fine-tuning under rounding


@dataclass(frozen=True)
class _Tuned:
    plan: Plan | None  # None: it was no better
    note: str


def _is_held_back(found: Plan, wanted: Quantize) -> bool:
    """Rounding cost so much that nodes had to go back up."""
    return wanted.budget.loss is not None and any(str(row["reason"]).startswith("lifted") for row in found.table)


def _fine_tuned(
    source: Source,
    model: str,
    shrunk: Shrunk,
    found: Plan,
    feeds: Tensors,
    evaluation: Evaluation,
    wanted: Quantize,
    plan: CompressionPlan,
    runtime: str,
) -> _Tuned:
    """Trains under rounding of all that was tried at int8, plans anew, and keeps it where it lets more nodes down at no more loss."""
    low = {row["name"]: row["tried"] for row in found.table if row["tried"] == "int8"}
    try:
        ranges = calibrate(shrunk.model, feeds, min_users=1)
        module = qat(shrunk.module, shrunk.model, low, ranges, shrunk.batches, runtime=runtime, steps=wanted.qat_steps, seed=plan.seed)
        again = _planned(exported(source, model, module, evaluation), feeds, shrunk, plan, wanted, runtime, lambda share, text: None)
    except InvalidInput as error:
        return _Tuned(None, f"{model} on {runtime}: not fine-tuned under rounding: {str(error).splitlines()[0]}")
    before, after = compare(shrunk.uncompressed, shrunk.judge(found.model)), compare(shrunk.uncompressed, shrunk.judge(again.model))
    better = again.chosen.size < found.chosen.size and after.cost <= max(before.cost, 1e-3)
    words = f"size {found.chosen.size:.1%} -> {again.chosen.size:.1%} of fp32's, loss {before.relative:+.2%} -> {after.relative:+.2%}"
    return _Tuned(again if better else None, f"{model} on {runtime}, fine-tuned under rounding: {words}: {'kept' if better else 'not kept'}")


# --- what is shown


def _global(model: str, shrunk: Shrunk, feeds: Tensors, runtime: str, size: float) -> Variant:
    """Plain 8 bits, the largest nodes first, down to the planner's size: what the planner is held against."""
    tried = global_8bit(shrunk.model, shrunk.judge, calibrate(shrunk.model, feeds, min_users=1), runtime=runtime, feeds=feeds, size=size)
    return variant_of(model, runtime, tried, shrunk.model, shrunk.ms, "global")


def _against_uncompressed(variant: Variant, shrunk: Shrunk) -> Variant:
    """The planner compares with the model it was given; the plot with the uncompressed one."""
    return {**variant, "loss": 1 - (1 - shrunk.loss) * (1 - variant["loss"])}


def _not_chosen(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "chosen": False} for variant in variants]


def _as_qat(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "family": "qat", "name": f"fine-tuned, {variant['name']}"} for variant in variants]

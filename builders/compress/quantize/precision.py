"""The ONNX side of one model's compression: a precision for every node, on one runtime, and QAT where
rounding alone costs too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builders.compress.graph import parameters
from builders.compress.judge.evaluate import Evaluation
from builders.compress.judge.judge import compare
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.planner import Plan, global_8bit, plan_precisions
from builders.compress.quantize.planner import Variant as Tried
from builders.compress.quantize.qat import qat
from builders.compress.recipe import Quantize, Recipe
from builders.compress.results import NodePrecision, Variant
from builders.compress.shrink import Shrunk, exported
from builders.stages import Report
from ensemble.arrays import Tensors
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from builders.compress.source import Source

_CALIBRATION_USERS = 128  # unless the plan says; more hardly move the ranges


@dataclass(frozen=True)
class Choice:
    """The engine of one runtime, and how it was found."""

    model: bytes
    variants: list[Variant]
    nodes: list[NodePrecision]
    notes: list[str]


def choose_precisions(
    source: Source,
    model: str,
    shrunk: Shrunk,
    plan: Recipe,
    runtime: str,
    evaluation: Evaluation,
    report: Report,
) -> Choice:
    """The planner's engine, or that of a fine-tuned module where rounding would lose more than the plan
    allows."""
    wanted = plan.of(model).quantize
    assert wanted is not None
    feeds = evaluation.feeds(model, plan.calibration_users or min(_CALIBRATION_USERS, evaluation.most(model)))
    found = _planned(
        shrunk.model,
        feeds,
        shrunk,
        plan,
        wanted,
        runtime,
        lambda share, text: report(0.5 + share / 4, f"{runtime}, {text}"),
    )
    variants, notes = (
        variants_of(model, found, shrunk.model, shrunk.ms),
        [f"{model} on {runtime}: {note}" for note in found.notes],
    )
    if wanted.qat == "auto" and _is_held_back(found, wanted):
        report(0.75, f"{runtime}, fine-tuning under rounding")
        tuned = _fine_tuned(source, model, shrunk, found, feeds, evaluation, wanted, plan, runtime)
        notes.append(tuned.note)
        if tuned.plan is not None:
            found, variants = (
                tuned.plan,
                [*_not_chosen(variants), *_as_qat(variants_of(model, tuned.plan, shrunk.model, shrunk.ms))],
            )
    variants.append(_global(model, shrunk, feeds, runtime, found.chosen.size))
    whole = uncompressed(
        model, runtime, shrunk.reference, shrunk.reference_ms if runtime == "onnxruntime" else None
    )
    tried = [_against_uncompressed(variant, shrunk) for variant in variants]
    return Choice(found.model, [whole, *tried], nodes_of(model, found), notes)


def _planned(
    model: bytes,
    feeds: Tensors,
    shrunk: Shrunk,
    plan: Recipe,
    wanted: Quantize,
    runtime: str,
    report: Report,
) -> Plan:
    candidates = wanted.onnxruntime if runtime == "onnxruntime" else wanted.tensorrt
    budget: dict[str, Any] = {
        "max_loss": wanted.budget.loss,
        "target_size": wanted.budget.size,
        "target_latency": wanted.budget.latency,
    }
    if runtime == "tensorrt" and wanted.budget.latency is not None:
        budget = {
            "max_loss": plan.gate.ranking / 2
        }  # no GPU here to time it on: half of what the gate lets pass
    pinned = {
        node: precision
        for node, precision in wanted.pinned.items()
        if runtime == "tensorrt" or precision in ("int8", "fp32")
    }
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
    return wanted.budget.loss is not None and any(
        str(row["reason"]).startswith("lifted") for row in found.table
    )


def _fine_tuned(
    source: Source,
    model: str,
    shrunk: Shrunk,
    found: Plan,
    feeds: Tensors,
    evaluation: Evaluation,
    wanted: Quantize,
    plan: Recipe,
    runtime: str,
) -> _Tuned:
    """Trains under rounding of all that was tried at int8, plans anew, and keeps it where it lets more nodes
    down at no more loss."""
    low = {row["name"]: row["tried"] for row in found.table if row["tried"] == "int8"}
    try:
        ranges = calibrate(shrunk.model, feeds, min_users=1)
        module = qat(
            shrunk.module,
            shrunk.model,
            low,
            ranges,
            shrunk.batches,
            runtime=runtime,
            steps=wanted.qat_steps,
            seed=plan.seed,
        )
        again = _planned(
            exported(source, model, module, evaluation),
            feeds,
            shrunk,
            plan,
            wanted,
            runtime,
            lambda share, text: None,
        )
    except InvalidInput as error:
        return _Tuned(
            None, f"{model} on {runtime}: not fine-tuned under rounding: {str(error).splitlines()[0]}"
        )
    before, after = (
        compare(shrunk.uncompressed, shrunk.judge(found.model)),
        compare(shrunk.uncompressed, shrunk.judge(again.model)),
    )
    better = again.chosen.size < found.chosen.size and after.cost <= max(before.cost, 1e-3)
    words = f"size {found.chosen.size:.1%} -> {again.chosen.size:.1%} of fp32's, loss {before.relative:+.2%} -> {after.relative:+.2%}"
    return _Tuned(
        again if better else None,
        f"{model} on {runtime}, fine-tuned under rounding: {words}: {'kept' if better else 'not kept'}",
    )


# --- what is shown


def _global(model: str, shrunk: Shrunk, feeds: Tensors, runtime: str, size: float) -> Variant:
    """Plain 8 bits, the largest nodes first, down to the planner's size: what the planner is held against."""
    tried = global_8bit(
        shrunk.model,
        shrunk.judge,
        calibrate(shrunk.model, feeds, min_users=1),
        runtime=runtime,
        feeds=feeds,
        size=size,
    )
    return variant_of(model, runtime, tried, shrunk.model, shrunk.ms, "global")


def _against_uncompressed(variant: Variant, shrunk: Shrunk) -> Variant:
    """The planner compares with the model it was given; the plot with the uncompressed one."""
    return {**variant, "loss": 1 - (1 - shrunk.loss) * (1 - variant["loss"])}


def _not_chosen(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "chosen": False} for variant in variants]


def _as_qat(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "family": "qat", "name": f"fine-tuned, {variant['name']}"} for variant in variants]


def uncompressed(model: str, runtime: str, engine: bytes, ms: float | None) -> Variant:
    """The engine as it was exported, and its time at batch 8."""
    return {
        "model": model, "runtime": runtime, "name": "fp32", "family": "uncompressed", "loss": 0.0, "bytes": len(engine),
        "parameters": parameters(engine), "latency_ms": ms, "chosen": False,
    }  # fmt: skip


def variant_of(
    model: str,
    runtime: str,
    tried: Tried,
    engine: bytes,
    ms: float,
    family: str = "planner",
    *,
    chosen: bool = False,
) -> Variant:
    """One joint choice as a point of the plot; `engine`: the fp32 one that it was made from, `ms`: its time
    at batch 8."""
    return {
        "model": model, "runtime": runtime, "name": "planner" if chosen else tried.label, "family": family, "loss": tried.loss.relative,
        "bytes": round(tried.size * len(engine)), "parameters": parameters(engine),
        "latency_ms": None if tried.latency is None else tried.latency * ms, "chosen": chosen,
    }  # fmt: skip


def variants_of(model: str, plan: Plan, engine: bytes, ms: float) -> list[Variant]:
    """All that the planner tried for one model."""
    return [
        variant_of(model, plan.runtime, tried, engine, ms, chosen=tried.precisions == plan.chosen.precisions)
        for tried in plan.variants
    ]


def nodes_of(model: str, plan: Plan) -> list[NodePrecision]:
    """The planner's table of one model."""
    found: list[NodePrecision] = []
    for row in plan.table:
        loss = row.get("loss")
        changed, relative = (1 - loss["overlap"], loss["relative"]) if loss else (None, None)
        found.append({
            "model": model, "runtime": plan.runtime, "node": row["name"], "op": row["op"], "precision": row["chosen"],
            "changed": changed, "loss": relative, "parameters": row["parameters"], "reason": row["reason"],
        })  # fmt: skip
    return found

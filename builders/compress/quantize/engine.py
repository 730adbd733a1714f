"""Makes the quantized engine of one model on one runtime, with QAT where rounding alone costs too much.

This is the ONNX side of a model's compression; the torch side is builders/compress/shrink.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.compress.graph import parameters
from builders.compress.judge.evaluation import Evaluation
from builders.compress.judge.judge import compare
from builders.compress.quantize.calibration import Ranges, calibrate
from builders.compress.quantize.planner import ChosenPrecisions, Trial, choose_precisions, global_8bit
from builders.compress.quantize.qat import qat
from builders.compress.recipe import Quantize, Recipe
from builders.compress.results import NodePrecision, Variant
from builders.compress.shrink import Shrunk, exported
from builders.compress.source import Source
from builders.progress import Progress, part_of
from ensemble.arrays import Tensors
from ensemble.errors import InvalidInput

_CALIBRATION_USERS = 128  # unless the recipe says; more hardly move the ranges


@dataclass(frozen=True)
class Choice:
    """Holds the engine of one runtime, and how it was chosen."""

    model: bytes
    variants: list[Variant]
    nodes: list[NodePrecision]
    notes: list[str]


def choose_engine(
    source: Source,
    model: str,
    shrunk: Shrunk,
    recipe: Recipe,
    runtime: str,
    evaluation: Evaluation,
    progress: Progress,
) -> Choice:
    """Gives the planner's engine, or a fine-tuned module's where rounding loses more than is allowed."""
    wanted = recipe.of(model).quantize
    assert wanted is not None
    users = recipe.calibration_users or min(_CALIBRATION_USERS, evaluation.most(model))
    feeds = evaluation.feeds(model, users)
    ranges = calibrate(shrunk.model, feeds, min_users=1)
    task = _Task(source, model, shrunk, recipe, wanted, runtime, evaluation, feeds, ranges)
    chosen = task.choose(shrunk.model, ranges, part_of(progress, 0.5, 0.75, f"{runtime}, "))
    variants = variants_of(model, chosen, shrunk.model, shrunk.ms)
    notes = [f"{model} on {runtime}: {note}" for note in chosen.notes]
    if wanted.qat == "auto" and _is_held_back(chosen, wanted):
        progress(0.75, f"{runtime}, fine-tuning under rounding")
        tuned, note = task.fine_tune(chosen)
        notes.append(note)
        if tuned is not None:
            chosen = tuned
            tuned_variants = _as_qat(variants_of(model, tuned, shrunk.model, shrunk.ms))
            variants = [*_not_chosen(variants), *tuned_variants]
    variants.append(task.plain_8_bits(chosen.trial.size))
    ms = shrunk.reference_ms if runtime == "onnxruntime" else None
    whole = uncompressed(model, runtime, shrunk.reference, ms)
    tried = [_against_uncompressed(variant, shrunk) for variant in variants]
    return Choice(chosen.model, [whole, *tried], nodes_of(model, chosen), notes)


@dataclass(frozen=True)
class _Task:
    """Holds what all choices of precisions for one model on one runtime share."""

    source: Source
    model: str
    shrunk: Shrunk
    recipe: Recipe
    wanted: Quantize
    runtime: str
    evaluation: Evaluation
    feeds: Tensors
    ranges: Ranges  # of shrunk.model on `feeds`

    def choose(self, engine: bytes, ranges: Ranges, progress: Progress | None = None) -> ChosenPrecisions:
        """Lets the planner choose the precisions of an fp32 engine within the recipe's budget."""
        on_cpu = self.runtime == "onnxruntime"
        return choose_precisions(
            engine,
            self.feeds,
            self.shrunk.judge,
            ranges=ranges,
            runtime=self.runtime,
            flavor=self.wanted.flavor,
            candidates=self.wanted.onnxruntime if on_cpu else self.wanted.tensorrt,
            min_overlap=self.recipe.gate.overlap if self.recipe.keeps_weights else 0.0,
            pinned={
                node: precision
                for node, precision in self.wanted.pinned.items()
                if not on_cpu or precision in ("int8", "fp32")
            },
            progress=progress,
            **self._budget(),
        )

    def _budget(self) -> dict[str, Any]:
        """Gives the planner's keywords for the recipe's budget."""
        budget = self.wanted.budget
        if self.runtime == "tensorrt" and budget.latency is not None:
            # There is no GPU here to time it on: half of what the gate lets pass may be lost instead.
            return {"max_loss": self.recipe.gate.ranking / 2}
        return {
            "max_loss": budget.loss,
            "target_size": budget.size,
            "target_latency": budget.latency,
        }

    def fine_tune(self, chosen: ChosenPrecisions) -> tuple[ChosenPrecisions | None, str]:
        """Trains under rounding of all that was tried at int8, then chooses anew.

        Gives the new choice where it lets more nodes down at no more loss, else None; and a note on it.
        """
        where, shrunk = f"{self.model} on {self.runtime}", self.shrunk
        try:
            again = self._chosen_after_qat(chosen)
        except InvalidInput as error:
            return None, f"{where}: not fine-tuned under rounding: {str(error).splitlines()[0]}"
        before = compare(shrunk.uncompressed, shrunk.judge(chosen.model))
        after = compare(shrunk.uncompressed, shrunk.judge(again.model))
        better = again.trial.size < chosen.trial.size and after.cost <= max(before.cost, 1e-3)
        note = (
            f"{where}, fine-tuned under rounding: size {chosen.trial.size:.1%} -> {again.trial.size:.1%} of "
            f"fp32's, loss {before.relative:+.2%} -> {after.relative:+.2%}: "
            f"{'kept' if better else 'not kept'}"
        )
        return (again if better else None), note

    def _chosen_after_qat(self, chosen: ChosenPrecisions) -> ChosenPrecisions:
        low = {row["name"]: row["tried"] for row in chosen.table if row["tried"] == "int8"}
        module = qat(
            self.shrunk.module,
            self.shrunk.model,
            low,
            self.ranges,
            self.shrunk.batches,
            runtime=self.runtime,
            steps=self.wanted.qat_steps,
            seed=self.recipe.seed,
        )
        engine = exported(self.source, self.model, module, self.evaluation)
        return self.choose(engine, calibrate(engine, self.feeds, min_users=1))

    def plain_8_bits(self, size: float) -> Variant:
        """Lowers the largest nodes first, down to the planner's size: what the planner is held against."""
        engine, judge = self.shrunk.model, self.shrunk.judge
        trial = global_8bit(engine, judge, self.ranges, runtime=self.runtime, feeds=self.feeds, size=size)
        return variant_of(self.model, self.runtime, trial, engine, self.shrunk.ms, "global")


def _is_held_back(chosen: ChosenPrecisions, wanted: Quantize) -> bool:
    """Says whether rounding cost so much that nodes had to go back up."""
    return wanted.budget.loss is not None and any(
        str(row["reason"]).startswith("lifted") for row in chosen.table
    )


# --- what people are shown


def _against_uncompressed(variant: Variant, shrunk: Shrunk) -> Variant:
    """Adds what distilling and pruning lost: the planner knows only the model it was given."""
    return {**variant, "loss": 1 - (1 - shrunk.loss) * (1 - variant["loss"])}


def _not_chosen(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "chosen": False} for variant in variants]


def _as_qat(variants: list[Variant]) -> list[Variant]:
    return [{**variant, "family": "qat", "name": f"fine-tuned, {variant['name']}"} for variant in variants]


def uncompressed(model: str, runtime: str, engine: bytes, ms: float | None) -> Variant:
    """Describes the engine as it was exported; `ms` is its time for 8 users, None where it was not timed."""
    return {
        "model": model,
        "runtime": runtime,
        "name": "fp32",
        "family": "uncompressed",
        "loss": 0.0,
        "bytes": len(engine),
        "parameters": parameters(engine),
        "latency_ms": ms,
        "chosen": False,
    }


def variant_of(
    model: str,
    runtime: str,
    trial: Trial,
    engine: bytes,
    ms: float,
    family: str = "planner",
    *,
    chosen: bool = False,
) -> Variant:
    """Describes one trial. `engine` is the fp32 engine that it was made from, `ms` its time for 8 users."""
    return {
        "model": model,
        "runtime": runtime,
        "name": "planner" if chosen else trial.label,
        "family": family,
        "loss": trial.loss.relative,
        "bytes": round(trial.size * len(engine)),
        "parameters": parameters(engine),
        "latency_ms": None if trial.latency is None else trial.latency * ms,
        "chosen": chosen,
    }


def variants_of(model: str, found: ChosenPrecisions, engine: bytes, ms: float) -> list[Variant]:
    """Describes all that the planner tried for one model."""
    return [
        variant_of(model, found.runtime, trial, engine, ms, chosen=trial.precisions == found.precisions)
        for trial in found.trials
    ]


def nodes_of(model: str, found: ChosenPrecisions) -> list[NodePrecision]:
    """Describes each node of one model: the planner's table."""
    return [_node(model, found.runtime, row) for row in found.table]


def _node(model: str, runtime: str, row: dict[str, Any]) -> NodePrecision:
    loss = row.get("loss")
    return {
        "model": model,
        "runtime": runtime,
        "node": row["name"],
        "op": row["op"],
        "precision": row["chosen"],
        "changed": 1 - loss["overlap"] if loss else None,
        "loss": loss["relative"] if loss else None,
        "parameters": row["parameters"],
        "reason": row["reason"],
    }

"""Gives the shape of compress.json: what the stage `compress` tells people and `peregrine report` draws.

In a manifest it is report.compress.
"""

from __future__ import annotations

from typing import Any, TypedDict


class Variant(TypedDict):
    """Describes one engine that was tried for one model on one runtime: a point of the Pareto plot."""

    model: str
    runtime: str  # onnxruntime | tensorrt
    name: str  # a few words: "planner, 0.2%", "global int8", "structured 50%"
    family: str  # uncompressed | planner | global | prune | distil | qat
    loss: float  # relative NDCG@10 lost against the uncompressed engine, by the users that judge
    bytes: int
    parameters: int
    latency_ms: float | None  # at batch 8; None where it could not be measured (TensorRT without a GPU)
    chosen: bool  # what the release serves


class NodePrecision(TypedDict):
    """Describes one node: what it costs alone at the lowest precision it may have, and what was decided."""

    model: str
    runtime: str
    node: str
    op: str
    precision: str  # int8 | fp8 | fp16 | fp32
    changed: float | None  # share of the shown items that are others then; None = not asked of it alone
    loss: float | None  # relative NDCG@10 lost then; far noisier than `changed`
    parameters: int
    reason: str  # why it is not at its lowest; empty where it is


class EngineSize(TypedDict):
    """Describes one model of the release, before and after."""

    model: str
    runtime: str
    bytes: int
    reference_bytes: int
    parameters: int
    reference_parameters: int


class CompressionReport(TypedDict):
    """Describes all of compress.json."""

    plan: dict[str, Any]  # compress.recipe.facts
    plan_name: str  # preset, or the file's name
    engines: list[EngineSize]
    variants: list[Variant]
    nodes: list[NodePrecision]
    gates: dict[str, dict[str, Any]]  # runtime -> gate.Verdict.to_json()
    notes: list[
        str
    ]  # what was decided and why, one line each: "ranker at batch 8: int8 was slower, fp32 is kept"

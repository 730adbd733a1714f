"""Finds plans of both flavours of TensorRT, beside the release they were built from; each says what it fits.

    rN_plans/<key>/manifest.json    one engine: its key, the digests of its files; written last
    rN_plans/<key>/rN_<model>/      what Triton's native backend mounts: configs/tensorrt.pbtxt, 1/model.plan,
                                    warmup/ (a plan for RTX cards, which it cannot open, has no configs/)

<key> is a digest of all that decides whether a plan may run: see EngineKey. Several nodes may share one
repository: each takes the plans that fit it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.engines.flavors import (
    RTX,
    TENSORRT,
    TITLES,
    numbers,
    portable_refusal,
    precision_refusal,
    sm_refusal,
)
from ensemble.errors import ReleaseError
from ensemble.release.files import file_sha256
from ensemble.release.release import Release
from ensemble.spec import ModelSpec

PLAN_FILE = "model.plan"
TYPED_ONNX, ONNX = "model.tensorrt.onnx", "model.onnx"
MANIFEST = "manifest.json"
FORMAT = 1
RECIPE = 2  # raised when builders/compile makes something else of the same facts


@dataclass(frozen=True)
class Node:
    """Says what a machine runs plans with."""

    gpu: str  # "NVIDIA H200"
    sm: str  # "9.0"
    tensorrt: str  # "10.16.1"
    cuda: str  # of the driver, "13.0"
    flavor: str = TENSORRT


@dataclass(frozen=True)
class Range:
    """Says what shapes one input may have: an optimization profile's min, opt and max, batch axis first."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class EngineKey:
    """Names all that a plan depends on; two plans with one key are interchangeable.

    One for RTX cards depends on no GPU and no driver: cuda, sm and gpu are empty.
    """

    onnx_sha256: str
    tensorrt: str
    cuda: str
    sm: str
    gpu: str
    precision: str  # the types that the typed ONNX computes in: "fp16+fp32+int8"
    profile: tuple[Range, ...]
    sparse: bool  # 2:4 weights
    portable: bool  # other GPUs from SM 8.0 on, later TensorRT of the same major version
    recipe: int = RECIPE
    flavor: str = TENSORRT
    targets: tuple[
        str, ...
    ] = ()  # compute capabilities it was built for ("8.9"); none: the builder's default

    @property
    def digest(self) -> str:
        """Gives 16 hex digits, the same on every machine."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_shared(self) -> bool:
        """Says whether other kinds of GPU may run it, too."""
        return self.portable or (self.flavor == RTX and len(self.targets) != 1)

    def difference(self, node: Node) -> str:
        """Names the fact that keeps this plan from running on `node`; empty when it fits."""
        if self.flavor != node.flavor:
            return f"the plan is {TITLES[self.flavor]}'s, this node has {TITLES[node.flavor]}"
        lacking = precision_refusal(self.precision, node.sm, self.flavor)
        if lacking:
            return f"the plan does not fit: {lacking}"
        if self.flavor == RTX:
            return sm_refusal(RTX, node.sm) or self._other_target(node) or self._other_version(node)
        return self._outside(node) if self.portable else self._other_node(node)

    def _other_node(self, node: Node) -> str:
        """Names the first fact in which the node is not the one that built the plan."""
        for name, wanted, here in (("GPU", self.gpu, node.gpu), ("SM", self.sm, node.sm)):
            if wanted != here:
                return f"the plan is for {name} {wanted}, this node has {here}"
        return self._other_version(node)

    def _other_version(self, node: Node) -> str:
        if self.tensorrt == node.tensorrt:
            return ""
        return f"the plan is for {TITLES[self.flavor]} {self.tensorrt}, this node has {node.tensorrt}"

    def _other_target(self, node: Node) -> str:
        """Says why the node's GPU is none of those that the plan for RTX cards was built for."""
        if not self.targets:
            return portable_refusal(node.sm)
        if node.sm in self.targets:
            return ""
        return f"the plan is for SM {', '.join(self.targets)}, this node has {node.sm}"

    def _outside(self, node: Node) -> str:
        """Says why a portable plan of TensorRT does not run on the node."""
        version, oldest = numbers(node.tensorrt), numbers(self.tensorrt)
        if version[:1] != oldest[:1] or version < oldest:
            return (
                f"the portable plan is for TensorRT {self.tensorrt} to the end of its major version, this "
                f"node has {node.tensorrt}"
            )
        return portable_refusal(node.sm)


@dataclass(frozen=True)
class Plan:
    """Describes a plan on disk."""

    folder: Path  # rN_plans/<key>
    member: str  # rN_<model>
    key: EngineKey
    facts: dict[str, Any]  # the manifest

    @property
    def path(self) -> Path:
        """Gives the path of model.plan."""
        return self.folder / self.member / "1" / PLAN_FILE

    @property
    def member_folder(self) -> Path:
        """Gives what stands in for the release's member folder where Triton's native backend serves."""
        return self.folder / self.member

    def verify(self) -> None:
        """Raises ReleaseError for the first file that is not what the manifest says."""
        for relative, entry in self.facts["files"].items():
            try:
                same = file_sha256(self.folder / relative) == entry["sha256"]
            except OSError as error:
                raise ReleaseError(
                    f"cannot read {self.folder / relative}: {error.strerror}", _CURE
                ) from error
            if not same:
                raise ReleaseError(
                    f"{self.folder / relative} was changed or cut short (sha256 differs from its manifest)",
                    _CURE,
                )


_CURE = "remove its folder and run `peregrine compile` again"


def plans_folder(repository: Path, release: str) -> Path:
    """Gives the folder of one release's plans; it is removed with the release."""
    return repository / f"{release}_plans"


def source_onnx(release: Release, model: str) -> Path:
    """Gives the ONNX model that plans are built from.

    It is the typed one where the release was compressed for TensorRT, else the one that the CPU runs.
    """
    typed = release.member_file(model, TYPED_ONNX)
    return (
        typed
        if str(typed.relative_to(release.repository)) in release.manifest["files"]
        else release.member_file(model, ONNX)
    )


def find_plan(release: Release, model: str, node: Node) -> Plan:
    """Finds the plan of `model` that runs on `node` and was built from this release's ONNX model.

    Of several the one for just this GPU, which is faster; then the newest recipe, then the last built.
    ReleaseError says what is in the way.
    """
    wanted = release.manifest["files"][str(source_onnx(release, model).relative_to(release.repository))][
        "sha256"
    ]
    flag = " --flavor rtx" if node.flavor == RTX else ""
    cure = f"build plans on this node: `peregrine compile{flag}`"
    title = "" if node.flavor == TENSORRT else f" of {TITLES[node.flavor]}"
    every = [
        plan
        for plan in read_plans(release)
        if plan.member == f"{release.name}_{model}" and plan.key.flavor == node.flavor
    ]
    if not every:
        raise ReleaseError(f"{model}: release {release.name} has no plan{title}", cure)
    current = [plan for plan in every if plan.key.onnx_sha256 == wanted]
    if not current:
        raise ReleaseError(
            f"{model}: the plans of release {release.name} were built from another ONNX model", cure
        )
    fitting = [plan for plan in current if not plan.key.difference(node)]
    if not fitting:
        raise ReleaseError(f"{model}: {current[-1].key.difference(node)}", cure)
    places = enumerate(fitting)  # read_plans lists them oldest first
    return max(places, key=lambda at: (not at[1].key.is_shared, at[1].key.recipe, at[0]))[1]


def find_plans(release: Release, node: Node) -> dict[str, Plan]:
    """Gives {engine model of the pipeline: its plan}, verified.

    ReleaseError names the first that is missing, does not fit or was changed.
    """
    plans = {
        model.name: find_plan(release, model.name, node)
        for model in release.pipeline.models
        if model.is_engine
    }
    for plan in plans.values():
        plan.verify()
    return plans


def read_plans(release: Release) -> list[Plan]:
    """Lists every plan of a release, oldest first; ReleaseError names a manifest that cannot be read."""
    plans = [read_plan(path) for path in plans_folder(release.repository, release.name).glob(f"*/{MANIFEST}")]
    return sorted(plans, key=lambda plan: (plan.facts["created"], plan.folder.name))


def read_plan(path: Path) -> Plan:
    """Reads the plan that a manifest describes, without its files (Plan.verify).

    Raises ReleaseError if the manifest is none of ours.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ReleaseError(
                f"{path}: format {facts['format']} is not {FORMAT}, which this Peregrine reads", _CURE
            )
        ranges = tuple(
            Range(r["name"], *(tuple(r[part]) for part in ("least", "usual", "most")))
            for r in facts["key"]["profile"]
        )
        targets = tuple(facts["key"].get("targets", ()))
        key = EngineKey(**{**facts["key"], "profile": ranges, "targets": targets})
        str(facts["created"]), dict(facts["files"])
        return Plan(path.parent, facts["member"], key, facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(
            f"{path} is not the manifest of a plan ({type(error).__name__}: {error})", _CURE
        ) from None


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Gives the batch sizes that matter: a lone user, a chunk of a busy server, all that fits."""
    return tuple(sorted({1, min(8, max_batch), max_batch}))


def ranges(model: ModelSpec, max_batch: int) -> tuple[Range, ...]:
    """Gives the optimization profile of a model: the batch varies, the schema fixes every other axis."""
    least, usual, most = 1, min(8, max_batch), max_batch
    fixed = {tensor.name: tuple(int(size or 0) for size in tensor.dims) for tensor in model.inputs}
    for name, dims in fixed.items():
        if 0 in dims:
            raise ReleaseError(
                f"{model.name}: {name} {list(dims)} has an axis without a size",
                "a plan needs every axis but the batch fixed",
            )
    return tuple(Range(name, (least, *dims), (usual, *dims), (most, *dims)) for name, dims in fixed.items())

"""Finds TensorRT plans, which lie beside the release they were built from; each says which node it fits.

    rN_plans/<key>/manifest.json    one engine: its key, the digests of its files; written last
    rN_plans/<key>/rN_<model>/      what Triton's native backend mounts: configs/tensorrt.pbtxt, 1/model.plan,
                                    warmup/

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

from ensemble.errors import ReleaseError
from ensemble.release.files import file_sha256
from ensemble.release.release import Release
from ensemble.spec import ModelSpec

PLAN_FILE = "model.plan"
TYPED_ONNX, ONNX = "model.tensorrt.onnx", "model.onnx"
MANIFEST = "manifest.json"
FORMAT = 1
_PORTABLE_FROM = (8, 0)  # AMPERE_PLUS: the oldest SM that a portable plan runs on


@dataclass(frozen=True)
class Node:
    """Says what a machine runs plans with."""

    gpu: str  # "NVIDIA H200"
    sm: str  # "9.0"
    tensorrt: str  # "10.16.1"
    cuda: str  # of the driver, "13.0"


@dataclass(frozen=True)
class Range:
    """Says what shapes one input may have: an optimization profile's min, opt and max, batch axis first."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class EngineKey:
    """Names all that a plan depends on; two plans with one key are interchangeable."""

    onnx_sha256: str
    tensorrt: str
    cuda: str
    sm: str
    gpu: str
    precision: str  # the types that the typed ONNX computes in: "fp16+fp32+int8"
    profile: tuple[Range, ...]
    sparse: bool  # 2:4 weights
    portable: bool  # other GPUs from SM 8.0 on, later TensorRT of the same major version
    recipe: int = 1  # raised when compile.py changes what it makes of the same facts

    @property
    def digest(self) -> str:
        """Gives 16 hex digits, the same on every machine."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, node: Node) -> str:
        """Names the fact that keeps this plan from running on `node`; empty when it fits."""
        if not self.portable:
            facts = (
                ("GPU", self.gpu, node.gpu),
                ("SM", self.sm, node.sm),
                ("TensorRT", self.tensorrt, node.tensorrt),
            )
            for name, wanted, here in facts:
                if wanted != here:
                    return f"the plan is for {name} {wanted}, this node has {here}"
            return ""
        if _numbers(node.sm) < _PORTABLE_FROM:
            return f"the portable plan is for SM 8.0 and later, this node has SM {node.sm}"
        version, oldest = _numbers(node.tensorrt), _numbers(self.tensorrt)
        if version[:1] != oldest[:1] or version < oldest:
            return (
                f"the portable plan is for TensorRT {self.tensorrt} to the end of its major version, this "
                f"node has {node.tensorrt}"
            )
        return ""


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

    ReleaseError says what is in the way.
    """
    wanted = release.manifest["files"][str(source_onnx(release, model).relative_to(release.repository))][
        "sha256"
    ]
    cure = "build plans on this node: `peregrine compile`"
    every = [plan for plan in read_plans(release) if plan.member == f"{release.name}_{model}"]
    if not every:
        raise ReleaseError(f"{model}: release {release.name} has no plan", cure)
    current = [plan for plan in every if plan.key.onnx_sha256 == wanted]
    if not current:
        raise ReleaseError(
            f"{model}: the plans of release {release.name} were built from another ONNX model", cure
        )
    fitting = [plan for plan in current if not plan.key.difference(node)]
    if not fitting:
        raise ReleaseError(f"{model}: {current[-1].key.difference(node)}", cure)
    return min(fitting, key=lambda plan: plan.key.portable)  # one for just this GPU is faster


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
        key = EngineKey(**{**facts["key"], "profile": ranges})
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


def _numbers(version: str) -> tuple[int, ...]:
    """Gives a version such as "10.16.1" as numbers, which can be compared."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())

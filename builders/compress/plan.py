"""A compression plan: what is done to each engine of a release, as data. This page is that file's reference.

    seed = 0                              # of fine-tuning, calibration users and the bootstrap
    calibration_users = 128               # whose feeds set the ranges of quantization; never those that judge. Left out: 128, or all there are

    [ranker.distil]                       # one table a step; [user_encoder.…] and [item_encoder.…] likewise; steps left out are not taken
    student = {hidden = 96, expert = [64, 32]}   # widths of the student; those left out stay the teacher's
    kd = 1.0                              # weights of the losses: the teacher's logits, attention, relations between samples
    at = 0.5
    rd = 0.0
    temperature = 2.0
    steps = 2000

    [ranker.prune]
    method = "structured"                 # whole channels: faster; "two_four": for sparse tensor cores; "magnitude": single weights, no faster
    share = 0.5                           # of the channels (structured) or weights (magnitude) that go; magnitude may say `threshold = 1e-3`
    round_to = 16                         # channels kept: a multiple of this
    steps = 500                           # of fine-tuning after it

    [ranker.quantize]
    onnxruntime = ["int8", "fp32"]        # precisions a node may get there; [] leaves that runtime's engine as it is
    tensorrt = ["int8", "fp16", "fp32"]   # also fp8
    budget = {loss = 0.0025}              # exactly one of loss (relative NDCG@10 that may be spent), size, latency (shares of the fp32 engine's)
    pinned = {"node_linear_7" = "fp32"}   # nodes of the ONNX graph that are not the planner's to choose
    qat = "auto"                          # fake-quantized fine-tuning where the gate would not hold without; or "never"

    [gate]                                # limits: see Gate

Steps of a model are taken in the order distil, prune, quantize.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from builders.toml_file import read_toml
from ensemble.errors import InvalidInput

PRESETS = ("none", "balanced", "small", "fast")
MODELS = ("user_encoder", "item_encoder", "ranker")
_FOLDER = Path(__file__).with_name("presets")
Precision = Literal["int8", "fp8", "fp16", "fp32"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prune(_Entry):
    """Weights or channels that are taken out, and the fine-tuning after it."""

    method: Literal["magnitude", "structured", "two_four"]
    share: float | None = Field(default=None, gt=0, lt=1)
    threshold: float | None = Field(default=None, gt=0)  # magnitude: |w| below it goes
    round_to: int = Field(default=16, ge=1, le=256)  # structured: channels kept are a multiple of it
    steps: int = Field(default=500, ge=0)  # of fine-tuning

    @model_validator(mode="after")
    def _one_measure(self) -> Prune:
        given = [name for name in ("share", "threshold") if getattr(self, name) is not None]
        allowed = {"magnitude": ("share", "threshold"), "structured": ("share",), "two_four": ()}[self.method]
        if len(given) > 1:
            raise ValueError("share and threshold are two measures of the same; keep one")
        if given and given[0] not in allowed:
            raise ValueError(
                f"method {self.method!r} takes no {given[0]}; leave it out"
                + (" (its share is one half)" if not allowed else "")
            )
        if allowed and not given:
            raise ValueError(f"method {self.method!r} needs {' or '.join(allowed)}, such as share = 0.5")
        return self


class Distil(_Entry):
    """A smaller student trained from the model: its widths, and the weights of the three losses."""

    student: dict[str, int | tuple[int, ...]] = Field(min_length=1)
    kd: float = Field(default=1.0, ge=0)  # logits
    at: float = Field(default=0.0, ge=0)  # attention
    rd: float = Field(default=0.0, ge=0)  # relations between the users of a batch
    temperature: float = Field(default=2.0, gt=0)
    steps: int = Field(default=2000, ge=1)

    @model_validator(mode="after")
    def _sane(self) -> Distil:
        for name, size in self.student.items():
            if min(size if isinstance(size, tuple) else (size,), default=0) < 1:
                raise ValueError(f"student.{name} = {size}: a size is at least 1")
        if self.kd + self.at + self.rd == 0:
            raise ValueError("kd, at and rd are all 0: the student would learn nothing; give one a weight")
        return self


class Budget(_Entry):
    """What the planner may spend or must reach: exactly one of three."""

    # relative NDCG@10 lost; the smallest engine within it is chosen
    loss: float | None = Field(default=None, gt=0, le=0.5)
    size: float | None = Field(default=None, gt=0, le=1)  # bytes, share of the fp32 engine's
    # at batch 8, share of the fp32 engine's; TensorRT, not timed here, may lose half of gate.ranking
    latency: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("loss", "size", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget is exactly one of loss, size, latency; it has {' and '.join(given) or 'none'}"
            )
        return self


class Quantize(_Entry):
    """Precisions chosen per node, by sensitivity, within a budget. A pin that a runtime does not know is none
    there."""

    onnxruntime: tuple[Literal["int8", "fp32"], ...] = ("int8", "fp32")
    tensorrt: tuple[Precision, ...] = ("int8", "fp16", "fp32")
    budget: Budget = Budget(loss=0.0025)
    pinned: dict[str, Precision] = {}  # node of the ONNX graph -> its precision
    qat: Literal["never", "auto"] = "auto"
    qat_steps: int = Field(default=500, ge=1)


class ModelPlan(_Entry):
    """What is done to one engine; None = not done."""

    distil: Distil | None = None
    prune: Prune | None = None
    quantize: Quantize | None = None

    @property
    def keeps_weights(self) -> bool:
        """True where only precision changes: then the lists must hardly change either (Gate.overlap)."""
        return self.distil is None and self.prune is None


class Gate(_Entry):
    """Limits of what users may lose against the uncompressed release."""

    # relative loss of HR@10, NDCG@10, recall@N; relative rise of a regression's RMSE
    ranking: float = Field(default=0.005, gt=0, le=0.5)
    auc: float = Field(default=0.002, gt=0, le=0.5)  # absolute loss, each task
    ece: float = Field(default=0.005, gt=0, le=0.5)  # absolute rise, each task
    # share of the top 10 that stays, where only precision changed
    overlap: float = Field(default=0.95, ge=0, lt=1)
    # relative loss of NDCG@10 in any slice of the users, after Holm's correction
    slices: float = Field(default=0.03, gt=0, le=1)
    slice_users: int = Field(default=2000, ge=1)  # slices of fewer users are reported, not gated
    samples: int = Field(default=1000, ge=200, le=20_000)  # resamples of the bootstrap


class CompressionPlan(_Entry):
    """All of a plan's file."""

    seed: int = Field(default=0, ge=0)
    calibration_users: int | None = Field(default=None, ge=8)
    user_encoder: ModelPlan = ModelPlan()
    item_encoder: ModelPlan = ModelPlan()
    ranker: ModelPlan = ModelPlan()
    gate: Gate = Gate()

    def of(self, model: str) -> ModelPlan:
        """The part of one of MODELS."""
        return {"user_encoder": self.user_encoder, "item_encoder": self.item_encoder, "ranker": self.ranker}[
            model
        ]

    @model_validator(mode="after")
    def _students_fit(self) -> CompressionPlan:
        for model in MODELS:
            distil = self.of(model).distil
            known = _student_widths(model) if distil else ()
            if distil and not known:
                raise ValueError(
                    f"{model}.distil: there is no student for it, its widths are the contract's; prune or "
                    "quantize it instead"
                )
            for name in distil.student if distil else ():
                if name not in known:
                    raise ValueError(
                        f"{model}.distil.student.{name}: no such width; known here: {', '.join(known)}"
                    )
        return self

    @property
    def is_empty(self) -> bool:
        """True where nothing is done to any model."""
        return all(self.of(model) == ModelPlan() for model in MODELS)

    @property
    def keeps_weights(self) -> bool:
        """True where only precision changes, in every model."""
        return all(self.of(model).keeps_weights for model in MODELS)


def _student_widths(model: str) -> tuple[str, ...]:
    """What a student of the model may have smaller."""
    if model == "ranker":
        from builders.ranker.model import RankerConfig

        return tuple(field.name for field in dataclasses.fields(RankerConfig) if field.name != "dropout")
    return ("layers", "heads", "feed") if model == "user_encoder" else ()


NO_PLAN = CompressionPlan()


def read_plan(name_or_path: str | Path) -> CompressionPlan:
    """A preset by name, or a TOML file; InvalidInput names the file, the first wrong key, its value and the
    cure."""
    path = _FOLDER / f"{name_or_path}.toml" if str(name_or_path) in PRESETS else Path(name_or_path)
    try:
        return read_toml(CompressionPlan, path, f"compression plan {path}", first_error)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise InvalidInput(
            f"compression plan {name_or_path}: no such file, and no preset; presets: {', '.join(PRESETS)}"
        ) from None
    except OSError as error:
        raise InvalidInput(f"compression plan {path} cannot be read: {error.strerror}") from None


def first_error(error: ValidationError) -> str:
    """One line out of pydantic's report: the key, its value, what is wrong, and what would be right."""
    first = error.errors(include_url=False)[0]
    loc, kind, value = first["loc"], first["type"], first["input"]
    where, rest = ".".join(map(str, loc)), error.error_count() - 1
    if kind == "extra_forbidden":
        message = f"{where}: no such key; known here: {', '.join(_known_keys(loc[:-1]))}"
    elif kind == "missing":
        message = f"{where} is missing"
    elif kind == "value_error":
        message = f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    else:
        wanted = (
            "should be a table" if kind == "model_type" else first["msg"].replace("Input should", "should")
        )
        message = f"{where} = {value!r}: {wanted}"
    return message + (f" (and {rest} more)" if rest else "")


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the table at `loc`."""
    model: type[BaseModel] = CompressionPlan
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        model = next(
            kind
            for kind in (*typing.get_args(annotation), annotation)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return list(model.model_fields)


def facts(plan: CompressionPlan) -> dict[str, Any]:
    """The plan as JSON-able data: a stage's options, the manifest's entry."""
    return plan.model_dump(mode="json", exclude_defaults=True)

"""Reads a recipe: what is done to each engine of a release, as data.

builders/compress/README.md describes every key of the file, with an example that has them all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from builders.toml_file import read_toml
from ensemble.contract import IMAGE, TEXT
from ensemble.errors import InvalidInput

PRESETS = ("none", "balanced", "small", "fast")
MODELS = ("user_encoder", "item_encoder", "ranker")
CONTENT = (TEXT, IMAGE)  # encoders that are kept frozen: precision alone is chosen for them
_FOLDER = Path(__file__).with_name("presets")
Precision = Literal["int8", "fp8", "fp16", "fp32"]


class _Entry(BaseModel):
    """Refuses unknown keys, changes after reading, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Prune(_Entry):
    """Says which weights or channels are taken out, and how long the model is fine-tuned afterwards."""

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
    """Says how small a student is trained from the model, and what the three losses weigh."""

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
    """Says what the choice of precisions may spend or must reach: exactly one of three."""

    # the share of NDCG@10 that may be lost; the smallest engine within it is chosen
    loss: float | None = Field(default=None, gt=0, le=0.5)
    size: float | None = Field(default=None, gt=0, le=1)  # bytes, as a share of the fp32 engine's
    # time of 8 users, as a share of the fp32 engine's; TensorRT, which is not timed here, may lose half of
    # gate.ranking instead
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
    """Says which precisions the nodes may get, and within what budget.

    A pin to a precision that a runtime does not have is left out there.
    """

    onnxruntime: tuple[Literal["int8", "fp32"], ...] = ("int8", "fp32")
    tensorrt: tuple[Precision, ...] = ("int8", "fp16", "fp32")
    # What opens TensorRT's engine. On RTX cards int8 saves bytes and no time: fp8, if listed, comes first.
    flavor: Literal["tensorrt", "rtx"] = "tensorrt"
    budget: Budget = Budget(loss=0.0025)
    pinned: dict[str, Precision] = {}  # node of the ONNX graph -> its precision
    qat: Literal["never", "auto"] = "auto"
    qat_steps: int = Field(default=500, ge=1)


class ModelRecipe(_Entry):
    """Says what is done to one engine; a step that is None is not taken."""

    distil: Distil | None = None
    prune: Prune | None = None
    quantize: Quantize | None = None

    @property
    def keeps_weights(self) -> bool:
        """Is true where only precision changes: then the lists must hardly change either (Gate.overlap)."""
        return self.distil is None and self.prune is None


class LossBudget(_Entry):
    """Says which share of NDCG@10, of a search's own items, a smaller encoder of contents may lose."""

    loss: float = Field(default=0.005, gt=0, le=0.5)


class ContentQuantize(_Entry):
    """Says what rounding an encoder of texts or pictures may cost; it runs on CPUs."""

    budget: LossBudget = LossBudget()
    pinned: dict[str, Literal["int8", "fp32"]] = {}  # node of the ONNX graph -> its precision


class ContentRecipe(_Entry):
    """Says what is done to a text_encoder or an image_encoder, where the shop has one."""

    quantize: ContentQuantize | None = None


class Gate(_Entry):
    """Holds the limits of what users may lose against the uncompressed release."""

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


class Recipe(_Entry):
    """Holds all of a recipe's file: a part for each model, and the gate's limits."""

    seed: int = Field(default=0, ge=0)
    calibration_users: int | None = Field(default=None, ge=8)
    user_encoder: ModelRecipe = ModelRecipe()
    item_encoder: ModelRecipe = ModelRecipe()
    ranker: ModelRecipe = ModelRecipe()
    text_encoder: ContentRecipe = ContentRecipe()
    image_encoder: ContentRecipe = ContentRecipe()
    gate: Gate = Gate()

    def of(self, model: str) -> ModelRecipe:
        """Gives the part of `model`, one of MODELS."""
        parts = {"user_encoder": self.user_encoder, "item_encoder": self.item_encoder, "ranker": self.ranker}
        return parts[model]

    def of_content(self, model: str) -> ContentQuantize | None:
        """Gives what is done to `model`, one of CONTENT."""
        return {TEXT: self.text_encoder, IMAGE: self.image_encoder}[model].quantize

    @model_validator(mode="after")
    def _students_fit(self) -> Recipe:
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
        """Is true where nothing is done to any model."""
        return all(self.of(model) == ModelRecipe() for model in MODELS) and not any(
            self.of_content(model) for model in CONTENT
        )

    @property
    def keeps_weights(self) -> bool:
        """Is true where only precision changes, in every model."""
        return all(self.of(model).keeps_weights for model in MODELS)


def _student_widths(model: str) -> tuple[str, ...]:
    """Names the widths that a student of the model may have smaller; none where it can have no student."""
    if model == "ranker":
        from builders.ranker.model import RankerConfig

        return tuple(field.name for field in dataclasses.fields(RankerConfig) if field.name != "dropout")
    return ("layers", "heads", "feed") if model == "user_encoder" else ()


NO_RECIPE = Recipe()


def read_recipe(name_or_path: str | Path) -> Recipe:
    """Reads a preset by its name, or a TOML file.

    InvalidInput names the file, the first wrong key, its value and the cure.
    """
    path = _FOLDER / f"{name_or_path}.toml" if str(name_or_path) in PRESETS else Path(name_or_path)
    try:
        return read_toml(Recipe, path, f"recipe {path}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise InvalidInput(
            f"recipe {name_or_path}: no such file, and no preset; presets: {', '.join(PRESETS)}"
        ) from None
    except OSError as error:
        raise InvalidInput(f"recipe {path} cannot be read: {error.strerror}") from None


def facts(recipe: Recipe) -> dict[str, Any]:
    """Gives the recipe as data for JSON: the stage's options, and the manifest's entry."""
    return recipe.model_dump(mode="json", exclude_defaults=True)

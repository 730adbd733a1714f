"""Makes one model smaller in torch (distil, then prune, each fine-tuned), and exports it as fp32 ONNX.

The ONNX side is builders/compress/quantize/engine.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from builders.compress.distil.distil import DistilLosses, distil, distil_loss
from builders.compress.distil.students import student_ranker, student_user_encoder
from builders.compress.finetune import Batches, batches_from_feeds, finetune
from builders.compress.graph import parameters
from builders.compress.judge.evaluation import Evaluation
from builders.compress.judge.judge import Judge, Judged, compare
from builders.compress.judge.timing import time_pair, time_share
from builders.compress.prune.prune import Masks, magnitude, structured, two_four
from builders.compress.recipe import Distil, Prune, Recipe
from builders.compress.results import Variant
from builders.compress.session import open_onnx
from builders.encoders.models import UserEncoder
from builders.export.onnx_export import export_model, reweight_model
from builders.index.staged import StagedRelease
from builders.progress import Progress, part_of
from builders.ranker.model import Ranker
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from builders.compress.source import Source

TRAINING_USERS = 3000  # (or items) whose feeds teach; a quarter of a smaller shop's users
BATCHES = {"ranker": 16, "user_encoder": 256, "item_encoder": 512}  # users (items) a step
_CHECKED = 64  # users on whom an exported engine is held against torch
_ITEMS = 8192  # of the catalogue, that an encoder's student ranks like its teacher
_FINE_TUNING = DistilLosses(kd=1.0, temperature=1.0)  # after pruning the model learns to be itself again


@dataclass(frozen=True)
class Shrunk:
    """Holds one model on its way: as a module, as fp32 ONNX, and what the steps so far cost."""

    module: nn.Module
    model: bytes
    reference: bytes  # the uncompressed engine
    judge: Judge
    uncompressed: Judged
    batches: Batches
    ms: float  # time of 8 users, in onnxruntime on one thread
    reference_ms: float  # of the uncompressed engine
    loss: float = 0.0  # relative NDCG@10 lost so far, by the users that judge
    variants: list[Variant] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shrink(source: Source, model: str, recipe: Recipe, evaluation: Evaluation, progress: Progress) -> Shrunk:
    """Distils and prunes `model` as the recipe says; what it does not name is left out."""
    reference = StagedRelease(source.folder).member_file(model, "model.onnx").read_bytes()
    judge, part = evaluation.judge(model), recipe.of(model)
    batches = training_batches(source, model, evaluation)
    ms = _ms(reference, evaluation.feeds(model, min(8, evaluation.most(model))))
    state = Shrunk(source.modules[model], reference, reference, judge, judge(reference), batches, ms, ms)
    if part.distil:
        progress(0.0, "distilling")
        student = student_of(source, model, part.distil.student, recipe.seed)
        module = _distilled(state, student, part.distil, recipe.seed, progress)
        state = _next(
            source, model, state, module, "distil", f"student {_words(part.distil.student)}", evaluation
        )
    if part.prune:
        progress(0.3, "pruning")
        module = _pruned(state, part.prune, recipe.seed, progress)
        state = _next(
            source,
            model,
            state,
            module,
            "prune",
            f"{part.prune.method} {part.prune.share or part.prune.threshold or 0.5:g}",
            evaluation,
        )
    return state


def exported(
    source: Source,
    model: str,
    module: nn.Module,
    evaluation: Evaluation,
    like: tuple[nn.Module, bytes] | None = None,
) -> bytes:
    """Exports the module as a single-file fp32 ONNX model, held against torch on real feeds.

    `like` is a module that differs in its weights alone, and its ONNX model: that one is given the weights.
    """
    spec = StagedRelease(source.folder).model(model)
    feeds = evaluation.feeds(model, min(_CHECKED, evaluation.most(model)))
    with TemporaryDirectory() as folder:
        path, other = Path(folder) / "model.onnx", Path(folder) / "like.onnx"
        if like is None:
            export_model(module, spec, path, feeds)
        else:
            other.write_bytes(like[1])
            reweight_model(module, like[0], other, spec, path, feeds)
        return path.read_bytes()


def _next(
    source: Source,
    model: str,
    state: Shrunk,
    module: nn.Module,
    family: str,
    name: str,
    evaluation: Evaluation,
) -> Shrunk:
    """Gives the state after one step: exported, judged against the uncompressed engine, timed beside it."""
    engine = exported(source, model, module, evaluation)
    loss = compare(state.uncompressed, state.judge(engine)).relative
    feeds = evaluation.feeds(model, min(_CHECKED, evaluation.most(model)))
    ms = state.ms * time_share(engine, state.model, feeds, 8)[0]
    variant: Variant = {
        "model": model,
        "runtime": "onnxruntime",
        "name": name,
        "family": family,
        "loss": loss,
        "bytes": len(engine),
        "parameters": parameters(engine),
        "latency_ms": ms,
        "chosen": False,
    }
    note = (
        f"{model}, {name}: {parameters(engine):,} of {parameters(state.reference):,} parameters, "
        f"{ms:.2f} ms for 8 users, loss {loss:+.2%}"
    )
    return replace(
        state,
        module=module,
        model=engine,
        ms=ms,
        loss=loss,
        variants=[*state.variants, variant],
        notes=[*state.notes, note],
    )


def _ms(engine: bytes, feeds: dict[str, Array]) -> float:
    session = open_onnx(engine)
    return time_pair(lambda: session.run(feeds), lambda: session.run(feeds), limit_s=0.5)[0]


def training_batches(source: Source, model: str, evaluation: Evaluation) -> Batches:
    """Draws real inputs of the model; the user encoder's come with items to rank."""
    feeds = evaluation.feeds(model, min(TRAINING_USERS, evaluation.most(model)))
    items = evaluation.verifier.embeddings[1 : _ITEMS + 1]
    return batches_from_feeds(
        feeds, BATCHES[model], {"item_embeddings": items} if model == "user_encoder" else None
    )


def student_of(source: Source, model: str, sizes: Mapping[str, Any], seed: int) -> nn.Module:
    """Makes an untrained student, smaller in `sizes`; InvalidInput where no student of the model is known."""
    teacher = source.modules[model]
    if isinstance(teacher, Ranker):
        return student_ranker(teacher, source.dataset.schema, source.ranker_config, sizes, seed)
    if isinstance(teacher, UserEncoder):
        widths = {name: size for name, size in sizes.items() if isinstance(size, int)}
        return student_user_encoder(teacher, widths, seed)
    raise InvalidInput(
        f"{model}.distil: no student of {type(teacher).__name__} is known; distil ranker or user_encoder, "
        "or prune this one"
    )


def _distilled(state: Shrunk, student: nn.Module, wanted: Distil, seed: int, progress: Progress) -> nn.Module:
    losses = DistilLosses(wanted.kd, wanted.at, wanted.rd, 0.0, wanted.temperature)
    within = part_of(progress, 0.0, 0.3, "distilling, ")
    return distil(
        state.module, student, state.batches, losses, steps=wanted.steps, seed=seed, progress=within
    )


def _pruned(state: Shrunk, wanted: Prune, seed: int, progress: Progress) -> nn.Module:
    """Prunes the module and fine-tunes it, with the unpruned one as the teacher."""
    masks: tuple[Masks, ...] = ()
    if wanted.method == "structured":
        module = structured(
            state.module,
            wanted.share or 0.5,
            state.batches(np.random.default_rng(seed)),
            round_to=wanted.round_to,
        )
    else:
        module = copy.deepcopy(state.module)
        masks = (
            two_four(module)
            if wanted.method == "two_four"
            else magnitude(module, threshold=wanted.threshold, share=wanted.share),
        )
    if wanted.steps:
        within = part_of(progress, 0.3, 0.5, "fine-tuning, ")
        finetune(
            module,
            distil_loss(state.module, _FINE_TUNING),
            state.batches,
            steps=wanted.steps,
            seed=seed,
            repairs=masks,
            progress=within,
        )
    return module.eval()


def _words(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())

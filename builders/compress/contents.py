"""Makes what encodes texts or pictures smaller, and judges it by what a search finds with it.

Items keep the vectors of the uncompressed encoder; the smaller one encodes what people ask for, and items
that come while they are served. So the question is how well it finds items by the other's vectors: some
items' texts, whole and in part, and their pictures, cut and mirrored, each look for their own item among all.
A third of the samples calibrates, one judges the choice, and one is the gate's.

Axes: Q queries, I items, P components, K shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.compress.judge.gate import GateRow, finding_rows
from builders.compress.judge.judge import Judge, Judged
from builders.compress.judge.measure import TOP_K, Timing
from builders.compress.judge.timing import time_pair
from builders.compress.quantize.calibration import calibrate
from builders.compress.quantize.engine import Choice, nodes_of, uncompressed, variants_of
from builders.compress.quantize.planner import choose_whole
from builders.compress.recipe import ContentQuantize, Gate
from builders.content.samples import read_samples
from builders.data.dataset import Dataset
from builders.index.staged import StagedRelease
from builders.search.queries import asked_of
from ensemble.arrays import Array, Tensors
from ensemble.content.encoder import TOKENIZER, ContentEncoder, EncoderFacts, read_facts
from ensemble.content.pictures import pixels_from_picture
from ensemble.content.projection import PROJECTIONS, Projection, read_projections
from ensemble.content.texts import Tokenizer, padded
from ensemble.contract import TEXT
from ensemble.engines.onnx import OnnxEngine
from ensemble.index.looks import unit_rows
from ensemble.schema import Feature

RUNTIME = "onnxruntime"  # that runs it: steps encode on the CPU
_ITEMS = 50_000  # that a query looks for its own among
_FEWEST = 24  # samples, a third of which is left for each purpose
_SAME = 0.99  # cosine from which an item is the one that a sample is of
_PIECE = 64  # queries at once
_CUT = 0.8  # of a picture's sides
_BATCHES = (1, 8)


@dataclass(frozen=True)
class SmallerEncoder:
    """Holds what came of one encoder: its engine, and what the gate says of it."""

    choice: Choice
    rows: list[GateRow]
    timings: tuple[Timing, ...]


def smaller_encoder(
    dataset: Dataset,
    data: Path,
    staged: Path,
    model: str,
    wanted: ContentQuantize,
    limits: Gate,
    seed: int = 0,
) -> SmallerEncoder | str:
    """Puts an encoder of the staged release at 8 bits, or as much of it as its budget allows.

    `data` is the folder of the data stage. Gives why nothing was done where nothing could be.
    """
    feature = next((f for f in dataset.schema.items.features if f.encoder == model), None)
    if feature is None:
        return f"{model}: this shop has none"
    finding = Finding.of(dataset, staged, model, feature, seed)
    reference = StagedRelease(staged).member_file(model, "model.onnx").read_bytes()
    return smaller(finding, reference, finding.read(read_samples(data, feature.name)), wanted, limits)


def smaller(
    finding: Finding, reference: bytes, inputs: Sequence[Any], wanted: ContentQuantize, limits: Gate
) -> SmallerEncoder | str:
    """Does it for the encoder `reference`, whose samples are `inputs`; gives why nothing could be done."""
    model, seed = finding.facts.model, finding.seed
    own = finding.own(reference, inputs)
    known = np.flatnonzero(own >= 0)
    if len(known) < _FEWEST:
        return f"{model}: stays as it is, {len(known)} samples are too few to judge by"
    calibrating, judging, gating = (known[start::3].tolist() for start in range(3))
    feeds = finding.feeds([inputs[at] for at in calibrating])
    judge, last = (finding.judge([inputs[at] for at in part], own[part]) for part in (judging, gating))
    ranges = calibrate(reference, feeds, min_users=1)
    chosen = choose_whole(
        reference,
        feeds,
        judge,
        ranges=ranges,
        runtime=RUNTIME,
        max_loss=wanted.budget.loss,
        pinned=wanted.pinned,
    )
    timings = tuple(_timing(model, chosen.model, reference, feeds, batch) for batch in _BATCHES)
    ms = timings[-1].reference_ms
    variants = [uncompressed(model, RUNTIME, reference, ms), *variants_of(model, chosen, reference, ms)]
    notes = [f"{model} on {RUNTIME}: {note}" for note in chosen.notes]
    choice = Choice(chosen.model, variants, nodes_of(model, chosen), notes)
    rows = finding_rows(model, last(reference), last(chosen.model), limits, seed)
    return SmallerEncoder(choice, rows, timings)


def _timing(model: str, engine: bytes, reference: bytes, feeds: Tensors, batch: int) -> Timing:
    """Times both engines by turns on the first inputs of the calibration."""
    piece = {name: tensor[:batch] for name, tensor in feeds.items()}
    calls = [partial(OnnxEngine(one).run, piece) for one in (engine, reference)]
    return Timing(model, batch, *time_pair(calls[0], calls[1]))


@dataclass(frozen=True)
class Finding:
    """Holds how one encoder's vectors find items: by which components, among which."""

    facts: EncoderFacts
    tokenizer: Path | None
    projection: Projection
    items: Array  # [I, P] float32 of length 1, by the uncompressed encoder
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, staged: Path, model: str, feature: Feature, seed: int) -> Finding:
        """Reads it from a staged release."""
        there = np.flatnonzero(dataset.item_values[:, feature.columns.stop - 1] == 0)
        there = there[there > 0]
        if len(there) > _ITEMS:
            there = np.sort(np.random.default_rng(seed).choice(there, _ITEMS, replace=False))
        return cls(
            read_facts(staged / f"{model}.json"),
            staged / TOKENIZER if model == TEXT else None,
            read_projections(staged / PROJECTIONS)[feature.name],
            unit_rows(np.asarray(dataset.item_values[there][:, feature.columns])),
            seed,
        )

    def read(self, samples: Sequence[bytes]) -> list[Any]:
        """Gives texts, or pixels [3, side, side] float32 of pictures."""
        if self.tokenizer is not None:
            return [data.decode(errors="replace") for data in samples]
        return [pixels_from_picture(data, self.facts.side) for data in samples]

    def feeds(self, inputs: Sequence[Any]) -> Tensors:
        """Gives the encoder's tensors for some inputs."""
        if self.tokenizer is None:
            return {"pixels": np.stack(inputs)}
        tokens = Tokenizer(self.tokenizer, self.facts.max_tokens).tokens(inputs)
        return dict(zip(("token_ids", "token_mask"), padded(tokens, self.facts.max_tokens), strict=True))

    def scores(self, engine: bytes, inputs: Sequence[Any]) -> Array:
        """Gives the cosine of inputs [Q], as an engine encodes them, with every item: [Q, I] float32."""
        encoder = ContentEncoder(OnnxEngine(engine), self.facts, self.tokenizer)
        vectors = encoder.encode(inputs).vectors if self.tokenizer else encoder.of_pixels(inputs)
        return unit_rows(self.projection.values(vectors, vectors.any(axis=1))) @ self.items.T

    def own(self, reference: bytes, inputs: Sequence[Any]) -> Array:
        """Gives the item that each input [n] is of: [n] int64, -1 where it is none of these."""
        pieces = [inputs[start : start + _PIECE] for start in range(0, len(inputs), _PIECE)]
        scores = [self.scores(reference, piece) for piece in pieces]
        best = [np.where(one.max(axis=1) >= _SAME, one.argmax(axis=1), -1) for one in scores]
        return np.concatenate([np.zeros(0, np.int64), *best])

    def judge(self, inputs: Sequence[Any], own: Array) -> Judge:
        """Makes a judge of what finds the items `own` [n] of some inputs."""
        ways = [self._ways(one) for one in inputs]
        queries = [query for of in ways for query in of]
        wanted = np.repeat(own, [len(of) for of in ways])

        def judged(engine: bytes) -> Judged:
            parts = []
            for start in range(0, len(queries), _PIECE):
                scores = self.scores(engine, queries[start : start + _PIECE])
                true = np.take_along_axis(scores, wanted[start : start + _PIECE, None], axis=1)
                ranks = (scores > true).sum(axis=1)
                first = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K] + 1  # 0 is no item
                parts.append((metrics.gains(ranks, TOP_K), first))
            return Judged(*(np.concatenate(part) for part in zip(*parts, strict=True)))

        return judged

    def _ways(self, one: Any) -> list[Any]:
        """Gives what asks for the item of one input: its text whole, in part and mistyped; its picture cut at
        the edges and mirrored."""
        rng = np.random.default_rng(self.seed)
        if self.tokenizer is not None:
            return list(asked_of(one, set(), rng).values())
        side = self.facts.side
        places = ((np.arange(side) + 0.5) * _CUT + side * (1 - _CUT) / 2).astype(np.int64)
        return [np.ascontiguousarray(one[:, places][:, :, places[::-1]])]

"""Stage `compress`: makes a staged release's engines smaller, and proves that the result may be served.

    item_encoder -> (items encoded again, index) -> user_encoder -> ranker -> text_encoder, image_encoder
    -> gate, on the final engines of each runtime

Each model goes through distil, prune and quantize as the recipe says, judged in the chain as it stands by
then; the gate holds the whole against the uncompressed release, on users that chose nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np

from builders.compress.contents import SmallerEncoder, smaller_encoder
from builders.compress.graph import parameters
from builders.compress.judge import gate
from builders.compress.judge.evaluation import Evaluation
from builders.compress.judge.measure import Measured
from builders.compress.quantize.engine import Choice, choose_engine
from builders.compress.recipe import CONTENT, ModelRecipe, Recipe, facts
from builders.compress.results import CompressionReport, EngineSize, NodePrecision, Variant
from builders.compress.session import open_onnx
from builders.compress.shrink import Shrunk, shrink
from builders.compress.source import Source, open_source
from builders.data.splits import first_of_users
from builders.export.verifier import Verifier
from builders.folders import Inputs, link
from builders.index.choice import build_index
from builders.index.recall_files import write_vectors
from builders.index.snapshot import write_items
from builders.index.staged import StagedRelease
from builders.progress import Progress, part_of
from ensemble.index.item_index import VECTORS
from ensemble.json_text import json_text
from ensemble.steps.recall_settings import settings_from_json

ORDER = ("item_encoder", "user_encoder", "ranker")  # each is judged behind the ones before it
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.tensorrt.onnx"}
_QUERIES = 512  # user embeddings that tune the index anew


@dataclass(frozen=True)
class Options:
    """Holds what the stage was asked for: the recipe and its name."""

    recipe: Recipe
    recipe_name: str


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Fills `folder` with the staged release of the stage `export`, its engines compressed."""
    compress(open_source(inputs), options.recipe, options.recipe_name, folder, progress)


def compress(
    source: Source, recipe: Recipe, recipe_name: str, folder: Path, progress: Progress
) -> CompressionReport:
    """Fills `folder` with the compressed staged release and compress.json.

    InvalidInput, with the gate's table, where the gate fails.
    """
    for path in (p for p in source.folder.rglob("*") if p.is_file()):
        link(path, folder / path.relative_to(source.folder))
    work = _Work(source, recipe, folder, progress)
    work.evaluation(source.folder).check_users(recipe.calibration_users or 0)  # before anything is trained
    for place, model in enumerate(ORDER):
        if recipe.of(model) != ModelRecipe():
            work.compress(model, (place / 5, (place + 1) / 5))
    for model in CONTENT:
        if recipe.of_content(model) is not None:
            progress(0.6, f"{model}: what a search finds with it at 8 bits")
            work.compress_content(model)
    progress(0.75, "the gate: the whole chain on the test users")
    summary = work.summary(recipe_name)
    (folder / "compress.json").write_text(json_text(summary, indent=1))
    for verdict in work.verdicts.values():
        verdict.require(work.nodes)
    return summary


@dataclass
class _Work:
    """Holds what has been done so far."""

    source: Source
    recipe: Recipe
    folder: Path
    progress: Progress
    variants: list[Variant] = field(default_factory=list)
    nodes: list[NodePrecision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contents: list[SmallerEncoder] = field(default_factory=list)
    verdicts: dict[str, gate.Verdict] = field(default_factory=dict)

    def compress(self, model: str, share: tuple[float, float]) -> None:
        """Takes all steps of one model; its engines in the folder are then the new ones."""
        progress = part_of(self.progress, *share, f"{model}: ")
        evaluation = self.evaluation(self.folder)
        shrunk = shrink(self.source, model, self.recipe, evaluation, progress)
        self._keep(model, "onnxruntime", shrunk.model)
        self.variants += shrunk.variants
        self.notes += shrunk.notes
        choices = self._choices(model, shrunk, evaluation, progress)
        if "onnxruntime" in choices and "tensorrt" not in choices:
            self._keep(model, "tensorrt", shrunk.model)  # the CPU's form of 8 bits is no builder's
        for runtime, choice in choices.items():
            self._keep(model, runtime, choice.model)
            self.variants += choice.variants
            self.nodes += choice.nodes
            self.notes += choice.notes
        if model == "item_encoder":
            progress(0.9, "items encoded again, index")
            self._encode_items(evaluation)

    def compress_content(self, model: str) -> None:
        """Rounds an encoder of texts or pictures; what nobody can judge stays as it is."""
        source, recipe = self.source, self.recipe
        wanted = recipe.of_content(model)
        assert wanted is not None
        found = smaller_encoder(
            source.dataset, source.data, source.folder, model, wanted, recipe.gate, recipe.seed
        )
        if isinstance(found, str):
            self.notes.append(found)
            return
        self._keep(model, "onnxruntime", found.choice.model)
        self.contents.append(found)
        self.variants += found.choice.variants
        self.nodes += found.choice.nodes
        self.notes += found.choice.notes

    def _choices(
        self, model: str, shrunk: Shrunk, evaluation: Evaluation, progress: Progress
    ) -> dict[str, Choice]:
        """Chooses an engine for each runtime that the recipe quantizes for."""
        quantize = self.recipe.of(model).quantize
        wanted = (
            {} if quantize is None else {"onnxruntime": quantize.onnxruntime, "tensorrt": quantize.tensorrt}
        )
        return {
            runtime: choose_engine(self.source, model, shrunk, self.recipe, runtime, evaluation, progress)
            for runtime, precisions in wanted.items()
            if precisions
        }

    def evaluation(self, folder: Path) -> Evaluation:
        return Evaluation(
            self.source.dataset,
            folder,
            item_id_embeddings=self.source.item_id_embeddings,
            seed=self.recipe.seed,
        )

    def _keep(self, model: str, runtime: str, engine: bytes) -> None:
        path = self.folder / "engines" / model / FILES[runtime]
        path.unlink(missing_ok=True)  # a link into the uncompressed release, perhaps
        path.write_bytes(engine)

    def _encode_items(self, evaluation: Evaluation) -> None:
        """Encodes the items again and tunes the index: a new item's row must lie in the same space."""
        dataset, folder = self.source.dataset, self.folder
        encoder = open_onnx(StagedRelease(folder).member_file("item_encoder", "model.onnx").read_bytes())
        embeddings, features = evaluation.encoded_items(encoder, np.arange(dataset.num_items + 1))
        embeddings[0] = features[0] = 0  # no item
        for name in ("items.npy", "index.faiss", "recall.json"):
            (folder / name).unlink()
            if name != "items.npy":
                link(self.source.folder / name, folder / name)
        write_items(dataset, embeddings, features, folder)
        targets = dataset.validation
        firsts = first_of_users(targets.user_rows, 1)[:_QUERIES]
        queries = Verifier(dataset, folder).encode_users(
            targets.user_rows[firsts], targets.history_ends[firsts]
        )[:, 0]
        tuned, kind = build_index(
            np.ascontiguousarray(embeddings[1:]), np.ascontiguousarray(queries), self.recipe.seed
        )
        settings = settings_from_json((folder / "recall.json").read_text())
        for name in ("index.faiss", "recall.json", VECTORS):
            (folder / name).unlink(missing_ok=True)  # a link to the index stage's own: never written into
        faiss.write_index(tuned.index, str(folder / "index.faiss"))
        write_vectors(embeddings, kind, folder)
        (folder / "recall.json").write_text(
            dataclasses.replace(settings, **dataclasses.asdict(tuned.query)).to_json()
        )

    def summary(self, recipe_name: str) -> CompressionReport:
        """Measures the whole, holds it against the uncompressed release, and puts it all into one report."""
        evaluation = self.evaluation(self.source.folder)
        before = evaluation.measure(self.source.folder)
        for runtime, file in FILES.items():
            if runtime == "onnxruntime" or any((self.folder / "engines").glob(f"*/{file}")):
                self.verdicts[runtime] = self._verdict(before, evaluation.measure(self.folder, file=file))
        self._add_contents()
        for slower in self.verdicts["onnxruntime"].slower:
            self.notes.append(
                f"{slower.model} at batch {slower.batch} takes {slower.ms:.2f} ms, "
                f"{slower.reference_ms:.2f} ms uncompressed"
            )
        return {
            "plan": facts(self.recipe),
            "plan_name": recipe_name,
            "engines": [
                size
                for model in (*ORDER, *(c for c in CONTENT if self.recipe.of_content(c) is not None))
                for runtime in FILES
                if (size := self._size(model, runtime))
            ],
            "variants": self.variants,
            "nodes": self.nodes,
            "gates": {runtime: verdict.to_json() for runtime, verdict in self.verdicts.items()},
            "notes": self.notes,
        }

    def _add_contents(self) -> None:
        """Puts what the gate says of smaller encoders of contents to the runtime that runs them."""
        own = self.verdicts["onnxruntime"]
        rows = [row for found in self.contents for row in found.rows]
        timings = [timing for found in self.contents for timing in found.timings]
        self.verdicts["onnxruntime"] = gate.Verdict((*own.rows, *rows), (*own.timings, *timings))

    def _verdict(self, before: Measured, after: Measured) -> gate.Verdict:
        return gate.verdict(
            before, after, self.recipe.gate, keeps_weights=self.recipe.keeps_weights, seed=self.recipe.seed
        )

    def _size(self, model: str, runtime: str) -> EngineSize | None:
        after, before = (
            StagedRelease(self.folder).member_file(model, FILES[runtime]),
            StagedRelease(self.source.folder).member_file(model, "model.onnx"),
        )
        if not after.is_file():
            return None
        compressed, reference = after.read_bytes(), before.read_bytes()
        return {
            "model": model,
            "runtime": runtime,
            "bytes": len(compressed),
            "reference_bytes": len(reference),
            "parameters": parameters(compressed),
            "reference_parameters": parameters(reference),
        }

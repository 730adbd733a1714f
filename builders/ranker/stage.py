"""Stage `ranker`: turns impressions, or recall's own candidates, into the ranker and the rows it learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.data.dataset import open_dataset
from builders.folders import Inputs
from builders.index.stage import open_recall
from builders.own_model import OwnModel, open_own
from builders.progress import Progress
from builders.ranker.checkpoint import save_ranker
from builders.ranker.trainer import RankerTraining
from builders.ranker.training import train_ranker


@dataclass(frozen=True)
class Options:
    """Holds what the training of the ranker may choose."""

    training: RankerTraining
    own: OwnModel | None  # the user's own ranker
    seed: int


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Trains the ranker on what recall offers and saves its checkpoint."""
    dataset = open_dataset(inputs["data"])
    recall, item_embeddings = open_recall(inputs, dataset)
    trained = train_ranker(
        dataset,
        item_embeddings,
        scores=recall.scores if dataset.train_impressions is None else recall.popular_scores,
        candidates=recall.candidates,
        source_weights=recall.recall.settings.source_weights,
        config=options.training,
        ranker=open_own(options.own, dataset.schema, "ranker"),
        seed=options.seed,
        progress=progress,
    )
    save_ranker(trained, folder, options.training.model, options.own)

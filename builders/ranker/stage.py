"""Stage `ranker`: turns impressions, or recall's own candidates, into the ranker and the rows it learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.data.dataset import Dataset, open_dataset
from builders.data.spans import Span, read_span, save_span, span_of
from builders.folders import Inputs
from builders.index.stage import open_recall
from builders.own_model import OwnModel, open_own
from builders.progress import Progress, Watch, unwatched
from builders.ranker.checkpoint import open_ranker, save_ranker
from builders.ranker.config import RankerTraining, trained_as
from builders.ranker.refit import refit_ranker
from builders.ranker.training import train_ranker


@dataclass(frozen=True)
class Options:
    """Holds what the training of the ranker may choose."""

    training: RankerTraining
    own: OwnModel | None  # the user's own ranker
    seed: int


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress, watch: Watch = unwatched) -> None:
    """Trains the ranker on what recall offers, from the verified weights if there are some, and saves its
    checkpoint; `watch` sees the negative loss of each epoch on held-out rows."""
    dataset = open_dataset(inputs["data"])
    recall, item_embeddings = open_recall(inputs, dataset)
    verified, span = inputs.get("verified_ranker"), _span(dataset)
    if verified is not None:
        trained = refit_ranker(
            dataset,
            item_embeddings,
            open_ranker(verified, dataset.schema),
            read_span(verified).events,
            config=options.training,
            seed=options.seed,
            progress=progress,
        )
        span = span if trained.report["refit_epochs"] else read_span(verified)
    else:
        trained = train_ranker(
            dataset,
            item_embeddings,
            scores=recall.scores,
            candidates=recall.candidates,
            source_weights=recall.recall.settings.source_weights,
            config=options.training,
            ranker=open_own(options.own, dataset.schema, "ranker"),
            seed=options.seed,
            progress=progress,
            watch=watch,
        )
    save_ranker(trained, folder, trained_as(options.training, trained.report).model, options.own)
    save_span(span, folder)


def _span(dataset: Dataset) -> Span:
    """Gives the span of what the ranker learns from: impressions, or the validation targets."""
    if dataset.train_impressions is not None:
        return span_of(dataset.train_impressions.times)
    return span_of(dataset.histories.times[dataset.validation.history_ends])

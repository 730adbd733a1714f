"""Stage `encoders`: turns histories up to the split into an item encoder and a user encoder.

A refit goes on from the verified weights, over all that is known (builders/data/refit.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, open_dataset
from builders.data.refit import refit_epochs
from builders.data.spans import save_span, training_span
from builders.encoders.checkpoint import open_encoders, save_encoders
from builders.encoders.encoders import EncoderCheckpoint, EncoderConfig, Validation, fitted
from builders.encoders.encoding import known_histories, training_sequences
from builders.encoders.training import Start, train_encoders
from builders.folders import Inputs
from builders.learning import learning_report
from builders.own_model import OwnModel, open_own
from builders.progress import Progress, Watch, unwatched
from builders.weights import require_finite

# users x items ranked for early stopping: all users of Beauty, a thousand of a million items
_RANKED_PAIRS = 300_000_000
# Of the chosen epochs, and of the schedule: a half or all of it learned single histories by heart
REFIT_SHARE = 0.25


@dataclass(frozen=True)
class Options:
    """Holds what the training of the encoders may choose."""

    config: EncoderConfig
    own: OwnModel | None  # the user's own user encoder
    seed: int


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress, watch: Watch = unwatched) -> None:
    """Trains both encoders on the data stage's histories, from the verified weights if there are some, and
    saves their checkpoint; `watch` sees the NDCG@10 of each epoch that is judged."""
    dataset = open_dataset(inputs["data"])
    config, start = fitted(options.config, dataset.schema), None
    if "verified_encoders" in inputs:
        start = Start(open_encoders(inputs["verified_encoders"], dataset.schema), 1 - REFIT_SHARE)
        config = replace(config, epochs=refit_epochs(chosen_epochs(start.checkpoint), REFIT_SHARE))

    def tell(log: dict[str, float]) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in log.items())
        progress(log["epoch"] / config.epochs, figures)
        if "ndcg_at_10" in log:
            watch(int(log["epoch"]), log["ndcg_at_10"])

    checkpoint = train_encoders(
        training_sequences(dataset),
        dataset.item_codes,
        dataset.item_values,
        dataset.user_codes,
        dataset.user_values,
        config=config,
        seed=options.seed,
        validation=_validation(dataset) if start is None else None,
        user_encoder=open_own(options.own, dataset.schema, "user_encoder"),
        start=start,
        progress=tell,
    )
    states = checkpoint.item_state, checkpoint.user_state, checkpoint.event_state
    for weights in ({"ids": checkpoint.item_ids}, *states):
        require_finite("encoders", weights)
    save_encoders(checkpoint, folder, options.own)
    (folder / "report.json").write_text(json.dumps(_learning(checkpoint), indent=1))
    save_span(training_span(dataset), folder)


def chosen_epochs(checkpoint: EncoderCheckpoint) -> int:
    """Gives the epoch whose weights were kept: the best on the validation targets, or the last."""
    judged = [entry for entry in checkpoint.log if "ndcg_at_10" in entry] or checkpoint.log[-1:]
    return int(max(judged, key=lambda entry: entry.get("ndcg_at_10", 0.0))["epoch"])


def _learning(checkpoint: EncoderCheckpoint) -> dict[str, Any]:
    """Gives the report of what each epoch had."""
    judged = "ndcg_at_10"
    curve = [
        {"epoch": one["epoch"], "loss": one["loss"], **({"validation": one[judged]} if judged in one else {})}
        for one in checkpoint.log
    ]
    return learning_report(chosen_epochs(checkpoint), curve, "NDCG@10 of held-out next items")


def _validation(dataset: Dataset) -> Validation | None:
    """Gives (a sample of) the validation targets, by which training stops; None where there are none."""
    targets = dataset.validation
    if not len(targets.user_rows):
        return None
    most = max(1000, _RANKED_PAIRS // dataset.num_items)
    chosen = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:most])
    users, ends = targets.user_rows[chosen], targets.history_ends[chosen]
    return Validation(known_histories(dataset, users, ends), targets.item_rows[chosen], users)

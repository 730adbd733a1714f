"""Stage `encoders`: turns histories up to the split into an item encoder and a user encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders.data.dataset import Dataset, open_dataset, training_histories
from builders.encoders.checkpoint import save_encoders
from builders.encoders.encoders import EncoderConfig, Validation, fitted
from builders.encoders.encoding import known_histories
from builders.encoders.sequences import Sequences
from builders.encoders.training import train_encoders
from builders.folders import Inputs
from builders.own_model import OwnModel, open_own
from builders.progress import Progress

# users x items ranked for early stopping: all users of Beauty, a thousand of a million items
_RANKED_PAIRS = 300_000_000


@dataclass(frozen=True)
class Options:
    """Holds what the training of the encoders may choose."""

    config: EncoderConfig
    own: OwnModel | None  # the user's own user encoder
    seed: int


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Trains both encoders on the data stage's histories and saves their checkpoint."""
    dataset = open_dataset(inputs["data"])
    config = fitted(options.config, dataset.schema)

    def tell(log: dict[str, float]) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in log.items())
        progress(log["epoch"] / config.epochs, figures)

    checkpoint = train_encoders(
        Sequences(*training_histories(dataset)),
        dataset.item_codes,
        dataset.item_values,
        dataset.user_codes,
        dataset.user_values,
        config=config,
        seed=options.seed,
        validation=_validation(dataset),
        user_encoder=open_own(options.own, dataset.schema, "user_encoder"),
        progress=tell,
    )
    save_encoders(checkpoint, folder, options.own)


def _validation(dataset: Dataset) -> Validation | None:
    """Gives (a sample of) the validation targets, by which training stops; None where there are none."""
    targets = dataset.validation
    if not len(targets.user_rows):
        return None
    most = max(1000, _RANKED_PAIRS // dataset.num_items)
    chosen = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:most])
    users, ends = targets.user_rows[chosen], targets.history_ends[chosen]
    return Validation(known_histories(dataset, users, ends), targets.item_rows[chosen], users)

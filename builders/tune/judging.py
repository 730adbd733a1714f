"""Trains one setting of a shop and says what its lists are worth to the users of the validation part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders import metrics
from builders.data.dataset import open_dataset
from builders.data.splits import few_of_users
from builders.encoders import stage as encoders
from builders.export import stage as export
from builders.export.torch_engine import TorchEngine
from builders.export.trained import Trained
from builders.export.verifier import Verifier
from builders.folders import Inputs
from builders.index import stage as index
from builders.presets import Preset
from builders.progress import Progress, Watch, part_of, unwatched
from builders.ranker import stage as ranker
from builders.verify.values import Worth
from builders.verify.worth import worth_of
from ensemble import contract
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.release.held_out import FIGURE, WORTH

_SHARES = (0.0, 0.6, 0.65, 0.9, 1.0)  # of a trial's time, roughly: each step's end


@dataclass(frozen=True)
class Judged:
    """Holds what the lists were worth: of each row, whose it was, and the value."""

    figure: str  # FIGURE or WORTH, of `verify`
    measure: str  # what was measured, in words
    users: Array  # [Q] int64
    values: Array  # [Q] float64

    @property
    def value(self) -> float:
        """Gives the figure itself."""
        return float(self.values.mean())

    def save(self, file: Path) -> None:
        """Writes the rows, for a comparison with another trial's."""
        np.save(file, np.stack([self.users.astype(np.float64), self.values]), allow_pickle=False)


def judged(
    ready: Inputs,
    preset: Preset,
    seed: int,
    folder: Path,
    progress: Progress,
    *,
    watch_encoders: Watch = unwatched,
    watch_ranker: Watch = unwatched,
) -> Judged:
    """Runs in `folder` those stages of a build, from the encoders to the ranker, that are not `ready`; judges
    what came out by the test part of the dataset."""
    steps = [part_of(progress, *pair) for pair in itertools.pairwise(_SHARES)]
    found = dict(ready)
    if "encoders" not in ready:
        found["encoders"] = _new(folder, "encoders")
        options = encoders.Options(preset.encoders, None, seed)
        encoders.run(ready, options, found["encoders"], steps[0], watch_encoders)
        found["index"] = _new(folder, "index")
        index.run(found, index.Options(seed, None), found["index"], steps[1])
    found["ranker"] = _new(folder, "ranker")
    ranker.run(found, ranker.Options(preset.ranker, None, seed), found["ranker"], steps[2], watch_ranker)
    staged = _new(folder, "export")
    trained = export.without_engines(found, staged)
    return _judged(found["data"], staged, trained, steps[3])


def _new(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    return path


def _judged(data: Path, staged: Path, trained: Trained, progress: Progress) -> Judged:
    """Measures the primary figure of a release's report on the dataset's test part, with torch's modules in
    place of engines: an export takes longer than many a trial, and says the same."""
    dataset = open_dataset(data)
    pipeline = contract.recommend(dataset.schema)
    engines = {
        name: TorchEngine(trained.modules[name], pipeline.model(name)) for name in ("user_encoder", "ranker")
    }
    verifier = Verifier(dataset, staged, engines)
    worth = worth_of(verifier, data)
    if isinstance(worth, Worth):
        return Judged(WORTH, worth.measure, worth.users, worth.values["chain"][:, 0])
    users, ranks = verifier.ranks(few_of_users(dataset), progress, chain_only=True)
    if not len(users):
        raise InvalidInput(f"no user of the validation part can judge a setting ({worth})")
    return Judged(FIGURE, "NDCG@10 of held-out next items", users, metrics.gains(ranks["chain"], 10))

"""Says how the ranker is trained: the settings of presets, and what is derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from builders.ranker.model import TINY, RankerConfig

_STEPS, _FINEST = 150, 512  # batches of an epoch at least, while they have so many candidates


@dataclass(frozen=True)
class RankerTraining:
    """Says how the ranker is trained; rates are shares of rows, `batch` counts candidates."""

    model: RankerConfig = field(default_factory=RankerConfig)
    epochs: float = 5  # at most; learning rates fall linearly to 0 over them
    patience: int = 3  # epochs without a better validation before it stops
    batch: int = 2048  # at most: a small log is cut finer, so that an epoch has steps enough
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    row_rate: float = 1e-4  # learning rate of user and item rows; faster, they learn single clicks by heart
    row_decay: float = 1e-2  # pull of the rows in a batch towards 0
    row_scale: float = 0.01  # standard deviation of new rows
    id_dropout: float = 0.5  # users and items made unknown, so that unknown ones are served well
    # items of the history hidden, the newest excepted: a whole history would tell users apart
    history_dropout: float = 0.3
    # recall's scores hidden: they are a little too good on what recall was trained on
    score_dropout: float = 0.1
    context_dropout: float = 0.1  # contexts hidden: a request need not say any
    position_dropout: float = 0.2  # places hidden: what is left then is what is served
    # share a step keeps of the running mean of the weights, which is what is judged and exported; 0 = the
    # last weights
    average: float = 0.99
    # matrix products of training in bfloat16, on a CPU that has them; evaluation, calibration and the
    # exported ranker are float32
    bf16: bool = True
    # weight of a conditional task's loss on its own rows; the product alone learns it slowly from few clicks
    conditional: float = 1.0
    # rates of training are old by up to such a share of the rows (rates.py), as those that are served are
    rate_age: float = 0.1
    # (row_rate, id_dropout) tried before training, beside those above, for so many epochs of a sample
    tried_rows: tuple[tuple[float, float], ...] = ((1e-4, 0.5), (1e-3, 0.3), (1e-2, 0.1))
    tried_epochs: int = 3
    # of a shop with labels a small ranker is trained beside, and kept where held-out exposures are likelier
    # under it: a large one soon learns a short log by heart
    tries_small: bool = True
    list_epochs: int = 4  # `interact`: in place of epochs
    list_learning_rate: float = 3e-3  # `interact`: in place of learning_rate
    list_negatives: int = 128  # `interact`: recalled items a list and epoch
    uniform_negatives: int = 16  # `interact`: uniform items a list
    held_out: float = 0.25  # `interact`: share of users whose validation target only stops and calibrates
    # `interact`: at most this many test targets are reported on here (verify reports on all)
    test_lists: int = 4096


def with_tried_rows(config: RankerTraining, tried: list[dict[str, float]]) -> RankerTraining:
    """Gives the training with the settings of rows that were found best, the first of those `tried`; as it is
    where none were."""
    if not tried:
        return config
    return replace(config, row_rate=tried[0]["row_rate"], id_dropout=tried[0]["id_dropout"])


def small_of(config: RankerTraining) -> RankerTraining:
    """Gives the training of the small ranker beside this one's; what is no matter of size stays."""
    tried = TINY_TRAINING.tried_rows if config.tried_rows else ()
    return replace(TINY_TRAINING, rate_age=config.rate_age, conditional=config.conditional, tried_rows=tried)


def trained_as(config: RankerTraining, report: Mapping[str, Any]) -> RankerTraining:
    """Gives the training that made the ranker of a `report` under `config`: its size, and its rows."""
    config = small_of(config) if report.get("is_small") else config
    return with_tried_rows(config, report.get("rows_tried", []))


def num_batches_of(num_candidates: int, most: int) -> int:
    """Cuts an epoch into batches of at most `most` candidates; finer, down to 512, so that there are 150 if
    there can be: a log of 60,000 rows has learned little in thirty steps."""
    return max(1, round(num_candidates / most), min(_STEPS, round(num_candidates / _FINEST)))


BASE_TRAINING = RankerTraining()
TINY_TRAINING = RankerTraining(
    model=TINY,
    epochs=4,
    batch=512,
    learning_rate=5e-3,
    row_rate=1e-2,
    row_scale=0.05,
    weight_decay=1e-2,
    list_learning_rate=5e-3,
    id_dropout=0.1,
    tried_epochs=1,
    tries_small=False,
    history_dropout=0.1,
    list_negatives=32,
    uniform_negatives=8,
    test_lists=512,
)

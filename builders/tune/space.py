"""Says which settings are searched, and between which values.

Bounds follow the preset's own value, which somebody found good for shops like this; shares have bounds of
their own. Widths and layers that change what is served are left as the preset has them, but for the number of
the user encoder's layers. A setting that `--set` gives stays as given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builders.presets import Preset
from builders.settings import settings_of
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

_DIGITS = 3  # of a number that is tried: a preset file is read by people


@dataclass(frozen=True)
class Knob:
    """Says between which values a setting is searched: on a scale of logarithms where `log`."""

    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: BaseTrial, name: str) -> float | int:
        """Draws a value for the setting called `name`."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        value = trial.suggest_float(name, self.low, self.high, log=self.log)
        return float(f"{value:.{_DIGITS}g}")


# times the preset's value, on a scale of logarithms
_TIMES = {
    "encoders.learning_rate": 4.0,
    "encoders.temperature": 2.0,
    "encoders.num_uniform": 4.0,
    "encoders.epochs": 2.0,
    "ranker.learning_rate": 4.0,
    "ranker.weight_decay": 10.0,
    "ranker.row_decay": 10.0,
    "ranker.epochs": 2.0,
    "ranker.list_learning_rate": 4.0,
    "ranker.list_negatives": 2.0,
    "ranker.uniform_negatives": 2.0,
    "ranker.list_epochs": 2.0,
}
_BETWEEN: dict[str, tuple[float, float]] = {
    "encoders.layers": (1, 3),
    "encoders.dropout": (0.0, 0.6),
    "encoders.id_dropout": (0.0, 0.4),
    "encoders.history_dropout": (0.0, 0.1),
    "encoders.hard_from": (0.0, 0.9),
    "ranker.model.dropout": (0.0, 0.5),
    "ranker.history_dropout": (0.0, 0.6),
    "ranker.score_dropout": (0.0, 0.3),
}
# of the ranker, which learns from labels where there are some, else from recall's lists
_OF_LABELS = ("ranker.learning_rate", "ranker.row_decay", "ranker.epochs")
_OF_LISTS = tuple(
    f"ranker.{name}" for name in ("list_learning_rate", "list_negatives", "uniform_negatives", "list_epochs")
)


def space_of(
    preset: Preset, *, has_labels: bool, only: Sequence[str] = (), fixed: Sequence[str] = ()
) -> dict[str, Knob]:
    """Lists what is searched for a shop with or without labels: those that `only` names (a setting, or all
    whose names begin with it), without those that are `fixed`."""
    settings = settings_of(preset)
    idle = _OF_LISTS if has_labels else _OF_LABELS
    known = {name: _knob(name, settings[name]) for name in sorted({*_TIMES, *_BETWEEN}) if name in settings}
    known = {name: knob for name, knob in known.items() if name not in idle}
    for wanted in only:
        if not any(_is_part(name, wanted) for name in known):
            raise InvalidInput(f"--over {wanted}: is not searched; what is: {', '.join(known)}")
    found = {
        name: knob
        for name, knob in known.items()
        if (not only or any(_is_part(name, wanted) for wanted in only)) and name not in fixed
    }
    if not found:
        raise InvalidInput("nothing is left to search: --set gives every setting that --over names")
    return found


def as_json(space: Mapping[str, Knob]) -> dict[str, list[float]]:
    """Gives the bounds as JSON-able data."""
    return {name: [knob.low, knob.high] for name, knob in space.items()}


def starting_point(preset: Preset, space: Mapping[str, Knob]) -> dict[str, Any]:
    """Gives the preset's own values, with which a study begins."""
    settings = settings_of(preset)
    return {name: int(settings[name]) if knob.whole else settings[name] for name, knob in space.items()}


def changes_of(trial: BaseTrial, space: Mapping[str, Knob], start: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a trial's settings; gives those that differ from the `start`."""
    drawn = {name: knob.suggest(trial, name) for name, knob in space.items()}
    return {
        name: value for name, value in drawn.items() if not math.isclose(value, start[name], rel_tol=1e-3)
    }


def _is_part(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted.rstrip('.')}.")


def _knob(name: str, value: Any) -> Knob:
    whole = isinstance(value, int)
    if name in _BETWEEN:
        low, high = _BETWEEN[name]
        return Knob(min(low, value), max(high, value), False, whole)
    times = _TIMES[name]
    low, high = value / times, value * times
    if whole or name.endswith("epochs"):
        return Knob(max(1, math.floor(low)), max(2, math.ceil(high)), True, True)
    if value <= 0:  # a scale of logarithms has no 0
        return Knob(0.0, 0.01, False, False)
    return Knob(low, high, True, False)

"""Joins what the tasks say of a candidate with how relevant recall holds it: blend.json of a release.

    score = (sum of weight x task value) x relevance ^ power

relevance [0, 1] is recall's fused score as the probability that the candidate is the user's next item, so
that the product is a value over all candidates, not only over those that somebody was shown: ESMM (Ma et al.
SIGIR 2018, eq. 1) carried one step back. `power` was chosen by held-out behaviour (builders/ranker/blend.py).
Where ranking gained nothing there, `uses_tasks` is false, and the order is recall's own.

Axes: B batch, N candidates, S recall sources, T tasks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError

BLEND = "blend.json"
# A factor stays above 0, and what is divided by it finite. It is far below any relevance that a stranger's
# candidates have: where all are floored, a list is in the order of rows
_LEAST = 1e-30


@dataclass(frozen=True)
class Blend:
    """Holds the content of blend.json; as it stands here, tasks alone decide."""

    uses_tasks: bool = True
    power: float = 0.0  # of recall's relevance
    source_weights: tuple[float, ...] = ()  # of the fused score; none: all candidates are as relevant
    slope: float = 1.0  # relevance = 1 / (1 + exp(-(slope x fused score + bias)))
    bias: float = 0.0

    def to_json(self) -> str:
        """Writes the content of blend.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def relevance(self, candidate_scores: Array) -> Array:
        """Gives each candidate's relevance [B, N] float32 by candidate_scores [B, N, S]."""
        weights = np.array(self.source_weights or (0.0,) * candidate_scores.shape[2], np.float32)
        logit = candidate_scores @ weights * self.slope + self.bias
        return (1 / (1 + np.exp(-np.clip(logit, -80, 80)))).astype(np.float32)

    def score(self, values: Array, candidate_scores: Array, powers: Array, uses_tasks: Array) -> Array:
        """Joins values [B, N], the tasks' weighted sums, with relevance under each user's power [B], and
        says for whom the tasks count [B] bool: [B, N] float32.

        A negative value falls further behind the less relevant the candidate is.
        """
        if not powers.any() and uses_tasks.all():
            return values
        relevance = self.relevance(candidate_scores)
        factor = np.maximum(relevance ** powers[:, None], _LEAST)
        joined = np.where(values >= 0, values * factor, values / factor)
        return np.where(uses_tasks[:, None], joined, relevance).astype(np.float32)


def read_blend(folder: Path) -> Blend:
    """Reads blend.json of a release; one that has none blends tasks alone."""
    path = folder / BLEND
    if not path.exists():
        return Blend()
    try:
        raw = json.loads(path.read_text())
        return Blend(**{**raw, "source_weights": tuple(raw["source_weights"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ReleaseError(
            f"{BLEND} does not fit this Peregrine ({error})", "build the release again"
        ) from None

"""Chooses how many of the N candidates are a source's own: by the share of held-out next items among them.

All sources are asked once, as deep as any quota wants, and what they offer is merged under one choice after
another by the code that will be served.

Axes: Q held-out targets, N candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.schema import Schema
from ensemble.steps.recall import Recall

SHARES = (0.03, 0.1, 0.2, 3 / 8, 1 / 2)  # of the candidates, tried for each source beside what it has
# Its places are for users without a past, and who is held out has one
_NOT_FITTED = "popular"
# It finds what nobody has taken, and held-out items were taken, most of them before: it may only gain places
_ONLY_MORE = "content"


@dataclass(frozen=True)
class QuotaChoice:
    """Holds what each source offers to held-out users, and the item that they took next."""

    recall: Recall
    offers: Sequence[Array]  # [Q, N] int64 of each source, best first, -1 padded
    items: Array  # [Q] int64

    def best(
        self, quotas: Mapping[str, int], free: Sequence[str], chosen: Array | slice = slice(None)
    ) -> dict[str, int]:
        """Finds the quotas of the sources `free` that reach most of the chosen targets, one source after the
        other; equals leave what there was."""
        best, wanted = dict(quotas), self.recall.sizes.candidates
        for name in free:
            tried = dict.fromkeys((best[name], *(int(share * wanted) for share in SHARES)))
            least = best[name] if name == _ONLY_MORE else 0
            ways = [best | {name: places} for places in tried if places >= least]
            ways = [way for way in ways if sum(way.values()) < wanted]  # some are the user encoder's
            best = ways[int(np.argmax([self._reach(way, chosen) for way in ways]))]
        return best

    def _reach(self, quotas: Mapping[str, int], chosen: Array | slice) -> float:
        """Gives the share of the chosen targets that are among the candidates."""
        rows = self.recall.merged([of[chosen] for of in self.offers], quotas)
        return float((rows == self.items[chosen, None]).any(axis=1).mean())


def free_quotas(schema: Schema, off: Sequence[str]) -> list[str]:
    """Names the sources that are on and whose quota the shop leaves to a build."""
    fixed = {_NOT_FITTED, *off, *(source.name for source in schema.sources if source.is_set)}
    return [source.name for source in schema.sources if source.quota is not None and source.name not in fixed]

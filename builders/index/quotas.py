"""Chooses how many of the N candidates are a source's own: by the share of held-out next items among them.

All sources are asked once, as deep as any quota wants, and what they offer is merged under one choice after
another by the code that will be served. Of the choices that do not surely reach less than the best (95%,
paired bootstrap over users), the one nearest to what there was is taken: what lies between comes from items
that many take, and is paid by those that few have taken, which transitions find.

Axes: Q held-out targets, N candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.schema import Schema
from ensemble.steps.recall import Recall

SHARES = (0.03, 0.1, 0.2, 3 / 8, 1 / 2)  # of the candidates, tried for each source beside what it has
# Its places are for users without a past, and who is held out has one
_NOT_FITTED = "popular"
# It finds what nobody has taken, and held-out items were taken, most of them before: it may only gain places
_ONLY_MORE = "content"


@dataclass(frozen=True)
class QuotaChoice:
    """Holds what each source offers to held-out users, who they are, and the item that they took next."""

    recall: Recall
    offers: Sequence[Array]  # [Q, N] int64 of each source, best first, -1 padded
    users: Array  # [Q] int64
    items: Array  # [Q] int64

    def best(self, quotas: Mapping[str, int], free: Sequence[str], chosen: Array) -> dict[str, int]:
        """Finds the quotas of the sources `free` that reach most of the chosen targets, one source after the
        other; equals leave what there was."""
        best = dict(quotas)
        for name in free:
            ways = self._ways(best, name)
            best = ways[int(np.argmax([self._reached(way, chosen).mean() for way in ways]))]
        return best

    def nearest(self, quotas: Mapping[str, int], free: Sequence[str]) -> dict[str, int]:
        """Finds, of the quotas of the sources `free` that do not surely reach less of all targets than the
        best, those nearest to what there was, one source after the other."""
        nearest = dict(quotas)
        for name in free:
            ways = self._ways(nearest, name)
            reached = [self._reached(way) for way in ways]
            best = reached[int(np.argmax([of.mean() for of in reached]))]
            is_good = [paired_difference(of, best, self.users).low <= 0 for of in reached]
            good = [way for way, is_one in zip(ways, is_good, strict=True) if is_one]
            nearest = min(good, key=lambda way: abs(way[name] - ways[0][name]))
        return nearest

    def _ways(self, quotas: dict[str, int], name: str) -> list[dict[str, int]]:
        """Gives the quotas that are tried for one source: those that there are, and others after them."""
        wanted, before = self.recall.sizes.candidates, quotas[name]
        tried = dict.fromkeys((before, *(int(share * wanted) for share in SHARES)))
        least = before if name == _ONLY_MORE else 0
        ways = [quotas | {name: places} for places in tried if places >= least]
        return [way for way in ways if sum(way.values()) < wanted]  # some are the user encoder's

    def _reached(self, quotas: Mapping[str, int], chosen: Array | slice = slice(None)) -> Array:
        """Says which of the chosen targets are among the candidates: [Q] bool."""
        rows = self.recall.merged([of[chosen] for of in self.offers], quotas)
        found: Array = (rows == self.items[chosen, None]).any(axis=1)
        return found


def free_quotas(schema: Schema, off: Sequence[str]) -> list[str]:
    """Names the sources that are on and whose quota the shop leaves to a build."""
    fixed = {_NOT_FITTED, *off, *(source.name for source in schema.sources if source.is_set)}
    return [source.name for source in schema.sources if source.quota is not None and source.name not in fixed]

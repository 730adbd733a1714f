"""Fits how recall's sources weigh and how many places each has, and says what each adds: on held-out next
items, as it will be served.

A source beside the usual three is kept only where it gains. Weights are fitted on every second held-out
user, the gain is judged on the others: the share of next items among the N candidates, or NDCG@10 in recall's
order, must be surely better (95%, paired bootstrap over users), and neither surely worse. What is kept is
then fitted on all. Other quotas (quotas.py) are tried only where the best of either half surely reach more of
the other, both together, and NDCG@10 is not surely worse; the same must hold of those that are then chosen.

Axes: Q held-out targets, N candidates, S sources.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset
from builders.data.splits import MANY_AGAIN, share_again
from builders.index.offline import EncodeUsers, OfflineRecall
from builders.index.quotas import SHARES, QuotaChoice, free_quotas
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.options import Options, UserOptions
from ensemble.schema import DEFAULT_SOURCES
from ensemble.steps.recall import Recall, fused
from ensemble.steps.recall_settings import RecallSettings

_MOST, _MOST_LEFT_OUT = 4000, 2000  # held-out targets that weights are fitted on, and sources left out for
_FEWEST = 50  # with fewer, a further source stays off
_WEIGHTS: dict[str, tuple[float, ...]] = {
    "user_embeddings": (1.0,),
    "transitions": (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0),
    "popular": (0.0, 0.1, 0.2, 0.4),
    "content": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "walks": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
}
_AGAIN = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_ALIKE = 1e-9  # NDCG@10
_LAST_ITEMS = 5  # whose content is asked for; else all that the snapshot holds of a past


@dataclass(frozen=True)
class _Lists:
    """Holds the candidates of held-out users, and where the item that they took next stands."""

    users: Array  # [Q] int64
    rows: Array  # [Q, N] int64
    scores: Array  # [Q, N, S]
    column: Array  # [Q] int64, -1: not among the candidates

    def take(self, chosen: Array) -> _Lists:
        """Picks some of the lists."""
        return _Lists(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))

    def gains(self, weights: tuple[float, ...]) -> Array:
        """Gives each user's NDCG@10 [Q] in the order of the fused score."""
        return metrics.gains(
            metrics.ranks_from_scores(fused(self.rows, self.scores, weights), self.column), 10
        )

    def figures(self, weights: tuple[float, ...]) -> dict[str, Array]:
        """Says of each target [Q] whether it is found, and its NDCG@10."""
        return {f"recall@{self.rows.shape[1]}": self.column >= 0, "ndcg@10": self.gains(weights)}

    def best(self, names: Sequence[str], off: Sequence[str]) -> tuple[float, ...]:
        """Finds the weights of the sources `names` with the best NDCG@10; those that are `off` weigh 0.

        Of equally good ones popularity weighs most: these users have pasts, others have nothing else.
        """
        grid = list(itertools.product(*((0.0,) if name in off else _WEIGHTS[name] for name in names)))
        values = np.array([float(self.gains(weights).mean()) for weights in grid])
        tied = [grid[at] for at in np.flatnonzero(values >= values.max() - _ALIKE)]
        return (
            max(tied, key=lambda weights: weights[names.index("popular")]) if "popular" in names else tied[0]
        )


class Fitting:
    """Asks the recall that lies in a folder under one setting after another."""

    def __init__(self, dataset: Dataset, user_embeddings: Array, folder: Path) -> None:
        """Takes user_embeddings [Q, M, D] of dataset.validation, in its order."""
        targets = dataset.validation
        self.dataset, self.folder = dataset, folder
        self.names = dataset.schema.source_names
        self.extra = self.names[len(DEFAULT_SOURCES) :]
        self.chosen = np.sort(np.random.default_rng(0).permutation(len(targets.user_rows))[:_MOST])
        self.embeddings = user_embeddings[self.chosen]
        self.tried: list[dict[str, Any]] = []
        self.tried_quotas: dict[str, Any] = {}

    def settings(self, settings: RecallSettings) -> RecallSettings:
        """Fits the weights and the quotas, and switches off what does not gain."""
        off = tuple(self.extra)
        settings = dataclasses.replace(settings, off=off, source_weights=_plain(self.names))
        if not len(self.chosen):
            return settings
        lists = self._lists(settings)
        for name in self.extra:
            settings, lists = self._with(name, settings, lists)
        settings, lists = self._with_quotas(settings, lists)
        return dataclasses.replace(settings, source_weights=lists.best(self.names, settings.off))

    def again(self, settings: RecallSettings, encode_users: EncodeUsers) -> RecallSettings:
        """Fits how much it counts that a user took an item often, for who asks for what he had: on each
        held-out user's next event, with an item had before or not.

        Only where events often are of items had before, and nothing says what was shown: a ranker that learns
        from exposures knows such candidates.
        """
        dataset, ends = self.dataset, self.dataset.train_ends
        users = np.unique(dataset.validation.user_rows[self.chosen])
        users = users[ends[users] > dataset.histories.offsets[users]]
        weighs = "transitions" in self.names and settings.source_weights[self.names.index("transitions")]
        is_shown = dataset.train_impressions is not None
        if is_shown or not weighs or len(users) < _FEWEST:
            return settings
        if share_again(dataset.histories, dataset.train_ends) < MANY_AGAIN:
            return settings
        embeddings, next_items = encode_users(users, ends[users]), dataset.histories.item_rows[ends[users]]
        ways = [dataclasses.replace(settings, again=again) for again in _AGAIN]
        gains = []
        for way in ways:
            rows, scores = self._asked(way).candidates_for(embeddings, users, ends[users], _with_had)
            lists = _Lists(users, rows, scores, _columns(rows, next_items))
            gains.append(lists.gains(settings.source_weights))
        best = int(np.argmax([of.mean() for of in gains]))
        return ways[best] if paired_difference(gains[0], gains[best], users).low > 0 else settings

    def _with(self, name: str, before: RecallSettings, lists: _Lists) -> tuple[RecallSettings, _Lists]:
        """Tries one more source; gives what is better, settings and lists."""
        users, owner = np.unique(lists.users, return_inverse=True)
        if len(users) < _FEWEST:
            self.tried.append({"source": name, "kept": False, "why": "too few held-out users to tell"})
            return before, lists
        on = dataclasses.replace(before, off=tuple(other for other in before.off if other != name))
        seen = self.dataset.schema.sizes.seen
        depths = (_LAST_ITEMS, seen) if name == "content" else (before.content_items,)
        ways = [dataclasses.replace(on, content_items=items) for items in depths]
        found = [self._lists(way) for way in ways]
        half, other = (np.flatnonzero(owner % 2 == of) for of in (0, 1))
        weights = [one.take(half).best(self.names, on.off) for one in found]
        place = int(np.argmax([o.take(half).gains(w).mean() for o, w in zip(found, weights, strict=True)]))
        judged, plain = found[place].take(other), lists.take(other)
        base = lists.take(half).best(self.names, before.off)
        gain = _gains(plain, base, judged, weights[place])
        kept = any(of["low"] > 0 for of in gain.values()) and all(of["high"] >= 0 for of in gain.values())
        self.tried.append({"source": name, "kept": kept, "users": len(users) // 2, "gain": gain})
        return (ways[place], found[place]) if kept else (before, lists)

    def _with_quotas(self, before: RecallSettings, lists: _Lists) -> tuple[RecallSettings, _Lists]:
        """Tries other quotas of the sources that are on, but for those that the shop sets; gives what is
        better, settings and lists."""
        free = free_quotas(self.dataset.schema, before.off)
        users, owner = np.unique(lists.users, return_inverse=True)
        self.tried_quotas = {"kept": False, "before": {name: before.quotas[name] for name in free}}
        if len(users) < _FEWEST or not free:
            self.tried_quotas["why"] = "too few held-out users to tell" if free else "the shop sets them"
            return before, lists
        items = self.dataset.validation.item_rows[self.chosen]
        choice = QuotaChoice(*self._offers(before, free), lists.users, items)
        halves = [np.flatnonzero(owner % 2 == of) for of in (0, 1)]
        judged = self._judged(choice, before, lists, free, halves)
        quotas = choice.nearest(before.quotas, free)
        after = dataclasses.replace(before, quotas=quotas)
        found = lists if after == before else self._lists(after)
        gain = _gains(lists, lists.best(self.names, before.off), found, found.best(self.names, before.off))
        kept = all(_reaches_more(of) for of in (judged, gain))
        self.tried_quotas |= {"kept": kept, "users": len(users), "gain": gain, "judged": judged}
        self.tried_quotas["best"] = {name: quotas[name] for name in free}
        return (after, found) if kept else (before, lists)

    def _judged(
        self,
        choice: QuotaChoice,
        before: RecallSettings,
        lists: _Lists,
        free: Sequence[str],
        halves: Sequence[Array],
    ) -> dict[str, dict[str, float]]:
        """Says what the best quotas of either half of the targets gain on the other, both together."""
        plain, changed = list[dict[str, Array]](), list[dict[str, Array]]()
        for fitted, judged in (halves, halves[::-1]):
            after = dataclasses.replace(before, quotas=choice.best(before.quotas, free, fitted))
            weights = lists.take(fitted).best(self.names, before.off)
            plain.append(lists.take(judged).figures(weights))
            changed.append(plain[-1] if after == before else self._lists(after, judged).figures(weights))
        users = lists.users[np.concatenate(halves[::-1])]
        return _differences(_joined(plain), _joined(changed), users)

    def _offers(self, settings: RecallSettings, free: Sequence[str]) -> tuple[Recall, list[Array]]:
        """Opens recall, and asks each source about the chosen users, the `free` ones as deep as any quota
        wants."""
        deepest = {name: int(max(SHARES) * self.dataset.schema.sizes.candidates) for name in free}
        offline = self._asked(dataclasses.replace(settings, quotas={**settings.quotas, **deepest}))
        targets = self.dataset.validation
        asked = targets.user_rows[self.chosen], targets.history_ends[self.chosen]
        return offline.recall, offline.offers_for(self.embeddings, *asked)

    def left_out(self, settings: RecallSettings) -> list[dict[str, Any]]:
        """Says what each source that is on adds: what lists lose without it, the others weighing the same."""
        if not len(self.chosen):
            return []
        most = slice(0, _MOST_LEFT_OUT)
        every, rows = self._lists(settings, most), list[dict[str, Any]]()
        for place, name in enumerate(self.names):
            if name in settings.off:
                continue
            weights = tuple(0.0 if at == place else w for at, w in enumerate(settings.source_weights))
            without = self._lists(dataclasses.replace(settings, off=(*settings.off, name)), most)
            adds = _gains(without, weights, every, settings.source_weights)
            facts = {"quota": settings.quotas.get(name), "weight": settings.source_weights[place]}
            rows.append({"source": name, **facts, "users": len(np.unique(every.users)), "adds": adds})
        return rows

    def _lists(self, settings: RecallSettings, most: slice | Array = slice(None)) -> _Lists:
        """Asks recall under these settings about the chosen users, or `most` of them."""
        targets, chosen = self.dataset.validation, self.chosen[most]
        offline = self._asked(settings)
        users = targets.user_rows[chosen]
        rows, scores = offline.candidates_for(self.embeddings[most], users, targets.history_ends[chosen])
        return _Lists(users, rows, scores, _columns(rows, targets.item_rows[chosen]))

    def _asked(self, settings: RecallSettings) -> OfflineRecall:
        """Opens the recall of the folder under these settings."""
        (self.folder / "recall.json").write_text(settings.to_json())
        return OfflineRecall(self.dataset, self.folder, lambda user_rows, history_ends: np.zeros(0))


def _columns(rows: Array, items: Array) -> Array:
    """Says where in rows [Q, N] the items [Q] stand: [Q] int64, -1 where they do not."""
    is_there = rows == items[:, None]
    return np.where(is_there.any(axis=1), is_there.argmax(axis=1), -1)


def _with_had(num_users: int) -> Options:
    """Gives the options of users who ask for what they had, too."""
    return Options((UserOptions(exclude_seen=False),) * num_users)


def _gains(
    first: _Lists, first_weights: tuple[float, ...], second: _Lists, weights: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Says what the second lists have more than the first: share of next items found, and NDCG@10."""
    return _differences(first.figures(first_weights), second.figures(weights), second.users)


def _differences(
    first: Mapping[str, Array], second: Mapping[str, Array], users: Array
) -> dict[str, dict[str, float]]:
    """Says what the second figures [Q] of users [Q] have more than the first, by name."""
    found = {name: paired_difference(first[name], second[name], users) for name in first}
    return {name: {"mean": of.mean, "low": of.low, "high": of.high} for name, of in found.items()}


def _joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Puts the figures of parts of the targets together."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reaches_more(gain: Mapping[str, Mapping[str, float]]) -> bool:
    """Says whether recall@N, the first figure, surely rises, and NDCG@10 does not surely fall."""
    found, order = gain.values()
    return found["low"] > 0 and order["high"] >= 0


def _plain(names: Sequence[str]) -> tuple[float, ...]:
    """Gives the weights where nobody can be asked."""
    return tuple({"user_embeddings": 1.0, "transitions": 1.0}.get(name, 0.0) for name in names)

"""Measures what held-out users get of one staged release, user by user: all that the gate's statistics need.

Axes: Q held-out users (a next item each), K shown items, N candidates, E impressions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Impressions, Targets, some_contexts
from builders.export.verifier import BATCH, EVERY_USER_BELOW, SAMPLE, Verifier
from builders.index.snapshot import older_pasts
from ensemble import contract
from ensemble.arrays import Array, Tensors
from ensemble.engines import CHUNK
from ensemble.options import default_options
from ensemble.steps.reranking import Reranking

Run = Callable[[Tensors], Tensors]
TOP_K = 10  # shown items that are compared, and the cut of HR and NDCG
SHORT, LONG = 4, 20  # items known of a cold user at most, of a long history at least
CATEGORIES = 10  # slices: the categories with the most held-out next items


@dataclass(frozen=True)
class TaskOutcome:
    """Holds one task's held-out impressions, those only where it is defined."""

    name: str
    kind: str  # binary | regression
    users: Array  # [E] int64 user rows
    labels: Array  # [E] float64
    values: Array  # [E] float64: probabilities, or predicted numbers


@dataclass(frozen=True)
class Timing:
    """Holds one engine's CPU milliseconds at one batch size.

    They are medians of turns taken by it and by the reference's, in one run.
    """

    model: str
    batch: int  # users (items, for item_encoder)
    ms: float
    reference_ms: float

    @property
    def ratio(self) -> float:
        """Divides the two times; below 1 is faster than the reference."""
        return self.ms / self.reference_ms


@dataclass(frozen=True)
class Measured:
    """Holds what each held-out user got.

    Two of them are comparable where `users` and the tasks' labels are the same.
    """

    users: Array  # [Q] int64 user rows
    ranks: Array  # [Q] float64: place of the true next item in the chain's list, inf = missed
    recalled: Array  # [Q] float64: 1 where it was among the candidates
    lists: Array  # [Q, K] int64 item rows, best first, -1 padded
    slices: dict[str, Array]  # [Q] bool each
    tasks: tuple[TaskOutcome, ...] = ()
    timings: tuple[Timing, ...] = ()
    num_candidates: int = 0

    @property
    def gains(self) -> Array:
        """Gives each user's gain [Q]; the mean is NDCG@10."""
        return metrics.gains(self.ranks, TOP_K)

    @property
    def hits(self) -> Array:
        """Gives each user's hit [Q]; the mean is HR@10."""
        return metrics.hits(self.ranks, TOP_K)


def measure_ranking(verifier: Verifier, targets: Targets) -> Measured:
    """Runs the whole chain on (a sample of, on large catalogues) the targets."""
    dataset = verifier.dataset
    count = len(targets.user_rows)
    chosen = np.arange(count)
    if dataset.num_items >= EVERY_USER_BELOW and count > SAMPLE:
        chosen = np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])
    pieces = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    parts = at_once(lambda piece: _chain(verifier, targets, piece), pieces)
    ranks, recalled, lists = (np.concatenate(part) for part in zip(*parts, strict=True))
    slices = user_slices(dataset, targets, chosen)
    return Measured(
        targets.user_rows[chosen],
        ranks,
        recalled,
        lists,
        slices,
        num_candidates=dataset.schema.sizes.candidates,
    )


def at_once(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
    """Works on two pieces at a time: engines and large products release the GIL."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, pieces))


def _chain(verifier: Verifier, targets: Targets, piece: Array) -> tuple[Array, Array, Array]:
    """Gives ranks [B], recalled [B] and lists [B, K] of the targets at `piece`."""
    users, true = targets.user_rows[piece], targets.item_rows[piece]
    known = recalled_tensors(verifier, users, targets.history_ends[piece])
    rows = known["candidate_rows"]
    ordered = in_order(
        verifier.reranking,
        rows,
        in_chunks(verifier.ranker.run, {name: known[name] for name in contract.RANKER_INPUTS}),
        known["candidate_scores"],
    )
    return (
        metrics.ranks_from_lists(ordered, true),
        (rows == true[:, None]).any(1).astype(np.float64),
        ordered[:, :TOP_K],
    )


def recalled_tensors(verifier: Verifier, user_rows: Array, history_ends: Array) -> Tensors:
    """Gives all tensors up to the ranker, by name, as they would have been at `history_ends`.

    That is what features, user_encoder and recall give, for requests that say the context of some exposure.
    """
    contexts = some_contexts(verifier.dataset, user_rows)
    tensors = verifier.user_tensors(user_rows, history_ends, contexts=contexts)
    tensors |= verifier.user_encoder.run({name: tensors[name] for name in contract.USER_ENCODER_INPUTS})
    queries = verifier.offline.queries(user_rows, tensors)
    seen = {name: tensors[name] for name in contract.SEEN_TENSORS}
    older = older_pasts(verifier.dataset, user_rows, history_ends)
    options = default_options(len(user_rows))
    return tensors | verifier.recall.run(options, **seen, older=older, **queries)


def in_chunks(run: Run, feeds: Tensors) -> Array:
    """Computes the ranker's probabilities [B, N, T], as many users at a time as fit the core's cache."""
    count = len(next(iter(feeds.values())))
    pieces = [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
    return np.concatenate(
        [
            run({name: tensor[piece] for name, tensor in feeds.items()})["candidate_probabilities"]
            for piece in pieces
        ]
    )


def in_order(reranking: Reranking, rows: Array, probabilities: Array, scores: Array) -> Array:
    """Sorts candidate rows [B, N], of candidate_scores [B, N, S], by the blended score, as reranking does
    without options; NaN counts 0."""
    finite = np.nan_to_num(probabilities, nan=0.0, posinf=0.0, neginf=0.0)
    blended = np.where(rows > 0, reranking.blend(default_options(len(rows)), finite, scores), -np.inf)
    return np.take_along_axis(rows, np.lexsort((rows, -blended), axis=-1), axis=1)


def user_slices(dataset: Dataset, targets: Targets, chosen: Array) -> dict[str, Array]:
    """Gives {name: [Q] bool}: cold users, long histories, and the true next item's category.

    The category is that of the first category feature.
    """
    lengths = targets.history_ends[chosen] - dataset.histories.offsets[targets.user_rows[chosen]]
    found = {f"at most {SHORT} items known": lengths <= SHORT, f"{LONG} items known or more": lengths >= LONG}
    feature = next((f for f in dataset.schema.items.features if f.kind == "category"), None)
    if feature is None:
        return found
    values = np.asarray(dataset.item_codes[targets.item_rows[chosen], feature.start]) - feature.offset - 1
    names = dataset.vocabularies["items"][feature.name]
    known, counts = np.unique(values[values >= 0], return_counts=True)
    for value in known[np.argsort(-counts, kind="stable")][:CATEGORIES]:
        found[f"{feature.name}: {names[value]}"] = values == value
    return found


def measure_tasks(verifier: Verifier, impressions: Impressions) -> tuple[TaskOutcome, ...]:
    """Gives the ranker's values on held-out impressions."""
    values = verifier.impression_probabilities(impressions).astype(np.float64)
    outcomes = []
    for t, task in enumerate(verifier.dataset.schema.tasks):
        given = ~np.isnan(impressions.labels[:, t])
        labels = impressions.labels[given, t].astype(np.float64)
        outcomes.append(
            TaskOutcome(
                task.name, task.kind, impressions.user_rows[given], labels, np.nan_to_num(values[given, t])
            )
        )
    return tuple(outcomes)

"""Asks releases, and puts the answers into figures: of each release, and the mean of several.

Axes: Q targets, R releases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders import metrics
from builders.data.dataset import Targets
from builders.evaluate.asked import Asked, asked_of
from builders.evaluate.kept import Kept, open_kept
from builders.export.verifier import Verifier
from builders.verify.baselines import ranking_baselines
from ensemble.arrays import Array
from ensemble.errors import InvalidInput


@dataclass(frozen=True)
class Answers:
    """Holds what a release answered: the place of what each user took next, in each way's list."""

    kept: Kept
    targets: Targets
    ranks: dict[str, Array]  # way: [Q] float64, 0 = first, inf = not in the list
    report: dict[str, Any]

    def table(self) -> pa.Table:
        """Gives a row a user: who, how much was known, what came next, its place (from 1) in each list."""
        dataset, targets = self.kept.dataset, self.targets
        known = targets.history_ends - dataset.histories.offsets[targets.user_rows]
        columns = {
            "release": pa.array([self.kept.name] * len(known)),
            "user_id": _texts(dataset.user_ids[targets.user_rows - 1]),
            "known_events": known,
            "item_id": _texts(dataset.item_ids[targets.item_rows - 1]),
        }
        places = {way: pa.array(1 + of, mask=~np.isfinite(of)) for way, of in self.ranks.items()}
        return pa.table({**columns, **{f"place_{way}": place for way, place in places.items()}})


def evaluate(
    repository: Path,
    names: list[str],
    *,
    until: int | None = None,
    user_ids: list[bytes] | None = None,
    event: str | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> list[Answers]:
    """Asks each release; InvalidInput if they are of several shops."""
    kept = [open_kept(repository, name) for name in dict.fromkeys(names)]
    shops = {one.manifest["shop"]: one.name for one in kept}
    if len(shops) > 1:
        told = ", ".join(f"{name} of {shop!r}" for shop, name in shops.items())
        raise InvalidInput(f"releases of several shops have no common mean: {told}", "name those of one shop")
    asked = [asked_of(one, until, user_ids, event) for one in kept]
    return [_answers(one, of, progress) for one, of in zip(kept, asked, strict=True)]


def _answers(kept: Kept, asked: Asked, progress: Callable[[float, str], None]) -> Answers:
    verifier = Verifier(kept.dataset, kept.staged)
    targets = verifier.sampled(asked.targets)
    users, ranks = verifier.ranks(targets, lambda share, text: progress(share, f"{kept.name}: {text}"))
    report: dict[str, Any] = {
        "release": kept.name,
        "id": kept.manifest["id"],
        "model": "verified",
        "trained_up_to": kept.trained.words(),
        "users": len(users),
        "of_users": len(asked.targets.user_rows),
        "unknown_users": asked.unknown,
        "note": asked.note,
        "ranking": ranking_baselines(users, ranks),
    }
    if len(users):
        size = kept.dataset.schema.sizes.candidates
        report["recall"] = {f"recall@{size}": {way: metrics.recall_at(of, size) for way, of in ranks.items()}}
    if asked.impressions is not None and len(asked.impressions.times):
        progress(0.9, f"{kept.name}: impressions")
        report["tasks"] = verifier.task_metrics(asked.impressions)
    return Answers(kept, targets, ranks, report)


def write_ranks(answers: list[Answers], path: Path) -> None:
    """Writes all releases' answers as one parquet file; InvalidInput if that cannot be."""
    table = pa.concat_tables([one.table() for one in answers], promote_options="default")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}", "name another --out") from None


def figures_of(answers: Answers) -> dict[str, float]:
    """Gives a release's figures by name: "ndcg@10 chain", "auc cart", …"""
    found = {
        f"{figure} {way}": value["value"]
        for figure, of in answers.report["ranking"].items()
        for way, value in of["ways"].items()
    }
    return found | {
        f"{figure} {task}": float(value)
        for task, of in answers.report.get("tasks", {}).items()
        for figure, value in of.items()
        if figure.removesuffix("_with_position") in ("auc", "rmse", "ece") and np.isfinite(value)
    }


def means_of(answers: list[Answers]) -> dict[str, dict[str, float]]:
    """Gives each figure's mean over the releases and its standard error: {"mean", "standard_error"} by name.

    Releases that differ in their seed alone tell how much of a figure is luck of the training.
    """
    tables = [figures_of(one) for one in answers]
    found = {}
    for name in tables[0]:
        values = np.array([table[name] for table in tables if name in table])
        if len(values) == len(tables):
            error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
            found[name] = {"mean": float(values.mean()), "standard_error": error}
    return found


def _texts(ids: Array) -> pa.Array:
    """Gives ids [Q] S as text."""
    return pa.array(np.char.decode(ids, "utf-8", "replace"))

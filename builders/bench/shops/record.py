"""Asks a release what it ranks, and keeps that as a record: figures, and the rows behind them.

A record is four files of a folder. SHOP.json has all figures, what is served, the cost, the code, machine and
date; it is written last, so that where it is the record is whole. SHOP.parquet has a row a held-out next
item: `user_id`, `known_events`, `item_id`, its `place_WAY` in each way's list (from 1; empty: not in it),
`gain_chain` and `gain_recall`, its NDCG@10. SHOP.tasks.parquet, of shops with labels, has a row a held-out
exposure: `user_id`, `item_id`, `time`, and for each task `label_TASK` (empty: not defined), `ranker_TASK`,
what is served, and `placed_TASK`, the same where its place is known. SHOP.held_out.npy is the release's own:
what each list was worth.

Axes: Q held-out next items, E exposures, T tasks.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builders import bootstrap, metrics
from builders.data.dataset import Dataset, Impressions
from builders.evaluate.asked import asked_of
from builders.evaluate.evaluation import Answers
from builders.evaluate.kept import Kept, open_kept
from builders.export.verifier import Verifier
from builders.verify.baselines import NAMES
from ensemble.arrays import Array
from ensemble.bootstrap import Spread, Statistic, groups, ratio, spreads, user_rows, user_sums
from ensemble.errors import InvalidInput
from ensemble.json_text import json_text
from ensemble.release.files import write_durably
from ensemble.release.held_out import HELD_OUT, read_held_out
from ensemble.schema import Task
from ensemble.steps.blend import read_blend

NEXT, WORTH = "next item", "worth"  # what a figure is of, where it is of no task
CHAIN, RANKER, PLACED = "chain", "ranker", "placed"  # ways: what is served
WAYS = {
    **NAMES,
    CHAIN: "the served list",
    "user_encoder": "the user encoder alone",
    "recall": "recall's order",
}
WAYS |= {RANKER: "the ranker", PLACED: "the ranker, place known", "random": "any item"}
WAYS |= {"knowable": "the best by what is known", "best": "the best possible"}
STATISTICS: Mapping[str, Callable[..., Statistic]] = {
    "auc": bootstrap.auc,
    "ece": bootstrap.ece,
    "rmse": bootstrap.rmse,
}


@dataclass(frozen=True)
class Figure:
    """Holds a figure of a way, with a 95% interval where there is one."""

    of: str  # NEXT, WORTH, or a task
    way: str
    figure: str  # "ndcg@10", "auc", …
    value: float | None  # None: the rows cannot give it
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> tuple[str, str, str]:
        """Gives what makes two runs' figures the same one."""
        return self.of, self.way, self.figure


@dataclass(frozen=True)
class Record:
    """Holds what a release ranks, and the rows that its figures come from."""

    facts: dict[str, Any]  # of SHOP.json, without the figures
    figures: list[Figure]
    users: pa.Table
    tasks: pa.Table | None
    held_out: Array | None


def measure(repository: Path, name: str, tell: Callable[[float, str], None]) -> Record:
    """Asks release `name` about the rows that its build held out; InvalidInput where it has none of them."""
    kept = open_kept(repository, name)
    asked, verifier = asked_of(kept, None, None), Verifier(kept.dataset, kept.staged)
    targets, shown = verifier.sampled(asked.targets), asked.impressions
    users, ranks = verifier.ranks(targets, tell)
    tasks = None if shown is None or not len(shown.times) else _task_table(verifier, shown)
    report = kept.manifest["report"]
    size = kept.dataset.schema.sizes.candidates
    figures = [
        *next_item_figures(users, ranks, size),
        *_task_figures(kept.dataset, tasks),
        *_simple_figures(report),
        *_worth_figures(report),
    ]
    facts = {
        "release": {"name": name, "id": kept.manifest["id"], "preset": kept.manifest["preset"]},
        "seed": kept.manifest["seed"],
        "users": len(users),
        "exposures": 0 if tasks is None else len(tasks),
        "worth": report["worth"].get("measure", ""),
        "serves": served(kept, repository / name, size),
    }
    table = _user_table(Answers(kept, targets, ranks, {}))
    return Record(facts, figures, table, tasks, read_held_out(repository / name / HELD_OUT))


def served(kept: Kept, folder: Path, size: int) -> dict[str, str]:
    """Says in words what a release serves: two of which one line differs do not serve the same."""
    report, blend = kept.manifest["report"], read_blend(folder)
    ranker, recall = report["ranker"], report["recall"]
    off = recall.get("off", [])
    facts = {
        "order of lists": f"tasks x relevance ^ {blend.power:g}" if blend.uses_tasks else "recall's own",
        "ranker": "trained" if ranker["kept_epoch"] else "as before its training",
        "user encoder": "trained" if report["encoders"]["kept_epoch"] else "as before its training",
        "sources": ", ".join(one["source"] for one in recall["sources"] if one["source"] not in off),
        "candidates": f"{size}",
        "compressed": "yes" if "compress" in report else "no",
    }
    if "is_small" in ranker:
        facts["size of the ranker"] = "small" if ranker["is_small"] else "the preset's"
    if "deep_path" in ranker:
        facts["deep path"] = "on" if ranker["deep_path"] else "off"
    return facts


# --- figures


def of_places(figure: str, ranks: Array) -> Array:
    """Gives what each rank [Q] (0 = first, inf = missed) adds to a figure of lists: [Q] float64."""
    kind, _, k = figure.partition("@")
    return (metrics.gains if kind == "ndcg" else metrics.hits)(ranks, int(k))


def next_item_figures(users: Array, ranks: Mapping[str, Array], size: int) -> list[Figure]:
    """Gives NDCG@10, HR@10 and recall@`size` of each way's ranks [Q], of users [Q]."""
    if not len(users):
        return []
    num_users, group = groups(users)
    names = [(way, figure) for way in ranks for figure in ("ndcg@10", "hr@10", f"recall@{size}")]
    rows = user_rows(group, num_users)
    sums = [user_sums(group, of_places(figure, ranks[way]), num_users) for way, figure in names]
    measured = spreads([ratio(of, rows) for of in sums], num_users)
    return [_figure(NEXT, way, figure, of) for (way, figure), of in zip(names, measured, strict=True)]


def _task_figures(dataset: Dataset, tasks: pa.Table | None) -> list[Figure]:
    """Gives AUC and ECE, or RMSE, of each task's values."""
    if tasks is None:
        return []
    found: list[Figure] = []
    for task in dataset.schema.tasks:
        labels = column(tasks, f"label_{task.name}")
        rows = np.flatnonzero(np.isfinite(labels))
        users = tasks["user_id"].to_numpy()[rows]
        for way in (RANKER, PLACED) if len(rows) else ():
            if f"{way}_{task.name}" in tasks.column_names:
                values = column(tasks, f"{way}_{task.name}")[rows]
                found += _of_values(task, way, labels[rows], values, users)
    return found


def _of_values(task: Task, way: str, labels: Array, values: Array, users: Array) -> list[Figure]:
    """Gives the figures of one way's values [E]. An ECE has no interval of its own: noise is all that it
    sums, so a resample's is larger; in a difference that cancels."""
    num_users, group = groups(users)
    figure = "auc" if task.kind == "binary" else "rmse"
    [spread] = spreads([STATISTICS[figure](labels, values, group, num_users)], num_users, width=len(labels))
    found = [_figure(task.name, way, figure, spread)]
    if task.kind == "binary":
        found.append(Figure(task.name, way, "ece", metrics.ece(labels, values)))
    return found


def _simple_figures(report: Mapping[str, Any]) -> list[Figure]:
    """Gives what `verify` said of two rates and boosting, on the same exposures."""
    return [
        Figure(task, way, of["figure"], value["value"], value["low"], value["high"])
        for task, of in report["baselines"]["tasks"].items()
        for way, value in of["ways"].items()
        if way in ("two_rates", "boosting")
    ]


def _worth_figures(report: Mapping[str, Any]) -> list[Figure]:
    """Gives what `verify` said that each way's lists are worth, where that could be measured."""
    return [
        Figure(WORTH, way, "worth of an item shown", of["worth"])
        for way, of in report["worth"].get("ways", {}).items()
    ]


def _figure(of: str, way: str, figure: str, spread: Spread) -> Figure:
    value, low, high = (x if math.isfinite(x) else None for x in (spread.value, spread.low, spread.high))
    return Figure(of, way, figure, value, low, high)


# --- the rows behind them


def _user_table(answers: Answers) -> pa.Table:
    """Gives a row a held-out next item."""
    table = answers.table().drop_columns("release")
    for way in ("chain", "recall"):
        if way in answers.ranks:
            table = table.append_column(f"gain_{way}", pa.array(metrics.gains(answers.ranks[way], 10)))
    return table


def _task_table(verifier: Verifier, shown: Impressions) -> pa.Table:
    """Gives a row a held-out exposure: labels, and the values [E, T] that are served and, where the shop logs
    places, those at them."""
    dataset, values = verifier.dataset, verifier.impression_probabilities(shown)
    placed = verifier.in_place(shown, values)
    columns: dict[str, Any] = {
        "user_id": _texts(dataset.user_ids[shown.user_rows - 1]),
        "item_id": _texts(dataset.item_ids[shown.item_rows - 1]),
        "time": shown.times,
    }
    for at, task in enumerate(dataset.schema.tasks):
        labels = shown.labels[:, at]
        columns[f"label_{task.name}"] = pa.array(labels, mask=np.isnan(labels))
        columns[f"{RANKER}_{task.name}"] = values[:, at]
        if placed is not None:
            columns[f"{PLACED}_{task.name}"] = placed[:, at]
    return pa.table(columns)


def column(table: pa.Table, name: str) -> Array:
    """Gives a column of numbers [E] float64, NaN where it is empty."""
    return np.asarray(table[name].to_numpy(zero_copy_only=False), np.float64)


def _texts(ids: Array) -> pa.Array:
    return pa.array(np.char.decode(ids, "utf-8", "replace"))


# --- files


def write_record(record: Record, folder: Path, shop: str) -> None:
    """Writes the record's files, the one that says that it is whole last."""
    for table, kind in ((record.users, "parquet"), (record.tasks, "tasks.parquet")):
        (folder / f"{shop}.{kind}").unlink(missing_ok=True)
        if table is not None:
            pq.write_table(table, folder / f"{shop}.{kind}")
    (folder / f"{shop}.{HELD_OUT}").unlink(missing_ok=True)
    if record.held_out is not None:
        np.save(folder / f"{shop}.{HELD_OUT}", record.held_out, allow_pickle=False)
    facts = {**record.facts, "figures": [asdict(figure) for figure in record.figures]}
    write_durably(folder / f"{shop}.json", json_text(facts, indent=1).encode())


def is_done(folder: Path, shop: str) -> bool:
    """Says whether the folder has a whole record of the shop."""
    return (folder / f"{shop}.json").is_file()


def read_record(folder: Path, shop: str) -> Record:
    """Reads a record; InvalidInput, which names the file, where it cannot be read."""
    path = folder / f"{shop}.json"
    try:
        facts = json.loads(path.read_text())
        figures = [Figure(**figure) for figure in facts.pop("figures")]
        path = folder / f"{shop}.parquet"
        users = pq.read_table(path)
        path = folder / f"{shop}.tasks.parquet"
        tasks = pq.read_table(path) if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = " ".join(f"{error}".split())
        raise InvalidInput(
            f"cannot read {path}: {told}", "make the record again: --force, or its own command"
        ) from None
    return Record(facts, figures, users, tasks, read_held_out(folder / f"{shop}.{HELD_OUT}"))


def forget(folder: Path, shop: str) -> None:
    """Removes a record and the repository of its build."""
    for file in ("json", "parquet", "tasks.parquet", HELD_OUT, "log"):
        (folder / f"{shop}.{file}").unlink(missing_ok=True)
    shutil.rmtree(repository_of(folder, shop), ignore_errors=True)


def repository_of(folder: Path, shop: str) -> Path:
    """Gives the repository of a shop's build, which `peregrine evaluate` and `report` may ask further."""
    return folder / "repositories" / shop

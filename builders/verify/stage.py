"""Stage `verify`: measures what will be served on held-out users, and writes the release's report.

Full ranking stands next to popularity and the item-transition kNN on the same split; tasks are measured on
held-out impressions, next to what simple ways make of them (baselines.py). What each held-out user's list was
worth is kept beside the report, so that releases can be compared later (ensemble/release/held_out.py).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Targets, open_dataset
from builders.export.verifier import Verifier
from builders.folders import Inputs
from builders.index.staged import SOURCES_FILE
from builders.progress import Progress
from builders.search.fit import fit_search
from builders.verify.baselines import SAMPLE_ROWS, blend_lines, ranking_baselines, shortfalls, task_baselines
from builders.verify.by_truth import knowable_figures
from builders.verify.calibration import calibration
from builders.verify.canary import canary_of
from builders.verify.data_facts import data_facts
from builders.verify.first_clicks import first_click_shortfalls, first_clicks
from builders.verify.markdown import markdown, worth_shortfalls
from builders.verify.newcomers import newcomers
from builders.verify.shown import asked_lists, variety
from builders.verify.values import Worth
from builders.verify.worth import worth_of
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.json_text import json_text
from ensemble.release.canary import CANARY
from ensemble.release.held_out import FIGURE, HELD_OUT, WORTH, held_out_rows
from ensemble.steps.search_settings import SEARCH_FILE

CUTS = (5, 10, 20)


@dataclass(frozen=True)
class Options:
    """Holds how much the baselines learn from."""

    boosting_rows: int = SAMPLE_ROWS  # at most


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Asks the staged release about held-out users and writes report.json, report.md, canary.json and
    held_out.npy."""
    dataset, staged = open_dataset(inputs["data"]), inputs.get("compress") or inputs["export"]
    verifier = Verifier(dataset, staged)
    targets = verifier.sampled(dataset.test)
    worth = worth_of(verifier, inputs["data"])
    report: dict[str, Any] = {"worth": _worth_report(worth, dataset)}
    users, ranks = verifier.ranks(targets, progress)
    report["ranking"] = ranking_report(users, ranks, dataset.schema.sizes.candidates)
    report["ranking"]["repeats"] = verifier.repeats(dataset.test)
    if len(users):
        lists = asked_lists(verifier, targets)
        report["shown"] = variety(dataset, verifier.embeddings, lists)
        report["newcomers"] = newcomers(dataset, lists.ways["chain"], targets, ranks, worth)
    report["first_clicks"] = first_clicks(dataset, verifier)
    progress(0.9, "held-out impressions")
    if dataset.test_impressions is not None:
        values = verifier.impression_probabilities(dataset.test_impressions)
        report["tasks"] = verifier.task_metrics(dataset.test_impressions, values)
        report["calibration"] = calibration(dataset.schema.tasks, dataset.test_impressions, values)
        placed = verifier.in_place(dataset.test_impressions, values)
        for task, value in knowable_figures(dataset, inputs["data"], metrics.auc).items():
            report["tasks"][task]["knowable_auc"] = value
        progress(0.95, "baselines on the same rows")
    report["baselines"] = {
        **(
            task_baselines(dataset, values, placed, options.boosting_rows)
            if "tasks" in report
            else {"tasks": {}}
        ),
        "ranking": ranking_baselines(users, ranks),
    }
    report |= {model: read_json(inputs[model] / "report.json") for model in ("encoders", "ranker")}
    report["shortfalls"] = [
        *blend_lines(report["ranker"]),
        *worth_shortfalls(report["worth"]),
        *shortfalls(report["baselines"]),
        *first_click_shortfalls(report["first_clicks"]),
    ]
    report["data"] = data_facts(dataset)
    report |= served_facts(inputs, staged, verifier)
    gains = metrics.gains(ranks["chain"], 10) if len(users) else np.zeros(0)
    rows = _rows(dataset, targets, gains, worth)
    figure = FIGURE if isinstance(worth, str) else WORTH
    report["held_out"] = {"figure": figure, "rows": len(rows), "split": dataset.split["kind"]}
    np.save(folder / HELD_OUT, rows, allow_pickle=False)
    if dataset.schema.encoders:
        settings, report["search"] = fit_search(dataset, staged)
        (folder / SEARCH_FILE).write_text(settings.to_json())
    (folder / "report.json").write_text(json_text(report, indent=1))
    (folder / "report.md").write_text(markdown(dataset, report))
    (folder / CANARY).write_text(canary_of(dataset, staged).to_json())


def served_facts(inputs: Inputs, staged: Path, verifier: Verifier) -> dict[str, Any]:
    """Gives what earlier stages told of what is served: of export, recall and compression."""
    settings = dataclasses.asdict(verifier.recall.settings)
    told = read_json(inputs["index"] / SOURCES_FILE)
    facts = {
        "export": read_json(staged / "export.json"),
        "recall": {**settings, "tried": read_json(inputs["index"] / "tried.json"), **told},
    }
    return facts | ({"compress": read_json(staged / "compress.json")} if "compress" in inputs else {})


def _worth_report(worth: Worth | str, dataset: Dataset) -> dict[str, Any]:
    """Gives the report's first part; where no worth could be measured, why next items stand for it."""
    if isinstance(worth, str):
        return {"kind": "next_items", "why": worth}
    return worth.report(dataset.schema.tasks)


def _rows(dataset: Dataset, targets: Targets, gains: Array, worth: Worth | str) -> Array:
    """Puts names to held-out targets [Q], the gains [Q] of their users' lists, and what was worth what."""
    times = dataset.histories.times[targets.history_ends] if len(targets.user_rows) else np.zeros(0, np.int64)
    columns = [targets.user_rows, targets.item_rows, times, gains, np.full(len(gains), np.nan)]
    if isinstance(worth, Worth):
        value = worth.values["chain"][:, 0]
        if worth.kind == "truth":  # of some of the targets, which have a row a user
            asked = np.isin(targets.user_rows, worth.users)
            columns[4][asked] = value[np.isin(worth.users, targets.user_rows)]
        else:
            more = worth.users, worth.items, worth.times, np.full(len(value), np.nan), value
            columns = [np.concatenate(pair) for pair in zip(columns, more, strict=True)]
    users, items, times, gains, values = columns
    names = np.concatenate([np.zeros(1, dataset.item_ids.dtype), dataset.item_ids])
    return held_out_rows(dataset.user_ids[users - 1], names[items], times, gains, values)


def read_json(path: Path) -> Any:
    """Reads what an earlier stage wrote."""
    return json.loads(path.read_text())


def ranking_report(users: Array, ranks: dict[str, Array], num_candidates: int) -> dict[str, Any]:
    """Computes HR@k, NDCG@k and recall@N of each way, and the chain's gain by a bootstrap over users."""
    report: dict[str, Any] = {"users": len(users), "ways": {}}
    for name, of in ranks.items():
        cuts = {
            f"{what}@{k}": value(of, k)
            for k in CUTS
            for what, value in (("hr", metrics.hit_rate), ("ndcg", metrics.ndcg))
        }
        report["ways"][name] = {**cuts, f"recall@{num_candidates}": metrics.recall_at(of, num_candidates)}
    if len(users):
        report["chain_minus_recall_ndcg@10"] = vars(
            paired_difference(metrics.gains(ranks["recall"], 10), metrics.gains(ranks["chain"], 10), users)
        )
    return report

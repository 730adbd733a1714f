"""Stage `verify`: measures what will be served on held-out users, and writes the release's report.

Full ranking stands next to popularity and the item-transition kNN on the same split; tasks are measured on
held-out impressions. What each held-out user's list was worth is kept beside the report, so that releases can
be compared later (ensemble/release/held_out.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Targets, open_dataset
from builders.export.verifier import Verifier
from builders.folders import Inputs
from builders.progress import Progress
from builders.verify.canary import canary_of
from builders.verify.markdown import markdown
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.release.canary import CANARY
from ensemble.release.held_out import FIGURE, HELD_OUT, held_out_rows

CUTS = (5, 10, 20)


def run(inputs: Inputs, options: None, folder: Path, progress: Progress) -> None:
    """Asks the staged release about held-out users and writes report.json, report.md, canary.json and
    held_out.npy."""
    dataset, staged = open_dataset(inputs["data"]), inputs.get("compress") or inputs["export"]
    verifier = Verifier(dataset, staged)
    targets = verifier.sampled(dataset.test)
    users, ranks = verifier.ranks(targets, progress)
    report: dict[str, Any] = {"ranking": ranking_report(users, ranks, dataset.schema.sizes.candidates)}
    report["ranking"]["repeats"] = verifier.repeats(dataset.test)
    progress(0.9, "held-out impressions")
    if dataset.test_impressions is not None:
        report["tasks"] = verifier.task_metrics(dataset.test_impressions)
    report["ranker"] = read_json(inputs["ranker"] / "report.json")
    report |= served_facts(inputs, staged, verifier)
    gains = metrics.gains(ranks["chain"], 10) if len(users) else np.zeros(0)
    report["held_out"] = {"figure": FIGURE, "rows": len(users), "split": dataset.split["kind"]}
    np.save(folder / HELD_OUT, _rows(dataset, targets, gains), allow_pickle=False)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(markdown(dataset, report))
    (folder / CANARY).write_text(canary_of(dataset, staged).to_json())


def served_facts(inputs: Inputs, staged: Path, verifier: Verifier) -> dict[str, Any]:
    """Gives what earlier stages told of what is served: of export, recall and compression."""
    settings = dataclasses.asdict(verifier.recall.settings)
    facts = {
        "export": read_json(staged / "export.json"),
        "recall": {**settings, "tried": read_json(inputs["index"] / "tried.json")},
    }
    return facts | ({"compress": read_json(staged / "compress.json")} if "compress" in inputs else {})


def _rows(dataset: Dataset, targets: Targets, gains: Array) -> Array:
    """Puts names to held-out targets [Q] and what their users' lists were worth [Q]."""
    if not len(targets.user_rows):
        return held_out_rows(dataset.user_ids[:0], dataset.item_ids[:0], np.zeros(0, np.int64), gains)
    times = dataset.histories.times[targets.history_ends]
    users, items = dataset.user_ids[targets.user_rows - 1], dataset.item_ids[targets.item_rows - 1]
    return held_out_rows(users, items, times, gains)


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

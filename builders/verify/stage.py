"""Stage `verify`: measures what will be served on held-out users, and writes the release's report.

Full ranking stands next to popularity and the item-transition kNN on the same split; tasks are measured on
held-out impressions.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from builders import metrics
from builders.bootstrap import paired_difference
from builders.data.dataset import open_dataset
from builders.export.verifier import Verifier
from builders.folders import Inputs
from builders.progress import Progress
from builders.verify.canary import canary_of
from builders.verify.markdown import markdown
from ensemble.arrays import Array
from ensemble.release.canary import CANARY

CUTS = (5, 10, 20)


def run(inputs: Inputs, options: None, folder: Path, progress: Progress) -> None:
    """Asks the staged release about held-out users and writes report.json, report.md and canary.json."""
    dataset, staged = open_dataset(inputs["data"]), inputs.get("compress") or inputs["export"]
    verifier = Verifier(dataset, staged)
    users, ranks = verifier.ranks(dataset.test, progress)
    report: dict[str, Any] = {"ranking": ranking_report(users, ranks, dataset.schema.sizes.candidates)}
    progress(0.9, "held-out impressions")
    if dataset.test_impressions is not None:
        report["tasks"] = verifier.task_metrics(dataset.test_impressions)
    report["ranker"] = _json(inputs["ranker"] / "report.json")
    report["export"] = _json(staged / "export.json")
    settings = dataclasses.asdict(verifier.recall.settings)
    report["recall"] = {**settings, "tried": _json(inputs["index"] / "tried.json")}
    if "compress" in inputs:
        report["compress"] = _json(staged / "compress.json")
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.md").write_text(markdown(dataset, report))
    (folder / CANARY).write_text(canary_of(dataset, staged).to_json())


def _json(path: Path) -> Any:
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

"""Stage `refit_verify`: says whether the refitted release may be published in place of the verified one.

The report stays the verified model's: it alone was asked about rows that it had not seen. The refitted one
has learned from them, so their figures can only warn: whose lists are worse there than the verified model's
has not learned what it was taught. Where the shop keeps its test for good, they are a fair measure.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from builders.compress.judge import gate
from builders.compress.judge.measure import Measured, measure_ranking, measure_tasks
from builders.compress.recipe import Gate
from builders.data.dataset import Dataset, open_dataset, training_histories
from builders.data.spans import read_span
from builders.export.verifier import Verifier
from builders.folders import Inputs, link
from builders.index.staged import StagedRelease
from builders.progress import Progress
from builders.search.fit import fit_search
from builders.verify.canary import canary_of
from builders.verify.stage import read_json, served_facts
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference
from ensemble.errors import InvalidInput
from ensemble.json_text import json_text
from ensemble.local import LocalPipeline
from ensemble.release.canary import CANARY
from ensemble.release.held_out import HELD_OUT
from ensemble.steps.search_settings import SEARCH_FILE

_ASKED = 500  # users whose lists show which items are shown
_TOP_K = 10
# Wide: of rows that a model has learned from, its calibration error says little
_LIMITS = Gate(ranking=0.02, auc=0.005, ece=0.02, slices=0.1)


def run(inputs: Inputs, options: None, folder: Path, progress: Progress) -> None:
    """Holds the refitted release against the verified one, and writes what `verify` writes, of the refitted
    one; InvalidInput names the figures that say that it must not be published."""
    dataset, staged = open_dataset(inputs["data"]), inputs.get("compress") or inputs["export"]
    verified = inputs.get("verified_compress") or inputs["verified_export"]
    report = read_json(inputs["verified_verify"] / "report.json")
    progress(0.0, "held-out rows, before and after")
    verifier = Verifier(dataset, staged)
    refit = {
        "keeps_test": dataset.split["keep_test"],
        **_worth(dataset, Verifier(dataset, verified), verifier),
    }
    progress(0.8, "new items in the lists")
    refit["new_items"] = new_items(inputs, dataset, verified, staged)
    report |= {**served_facts(inputs, staged, verifier), "refit": refit}
    page = (inputs["verified_verify"] / "report.md").read_text()
    (folder / "report.md").write_text(page + _markdown(inputs, refit))
    link(inputs["verified_verify"] / HELD_OUT, folder / HELD_OUT)
    (folder / CANARY).write_text(canary_of(dataset, staged).to_json())
    if dataset.schema.encoders:
        settings, report["search"] = fit_search(dataset, staged)
        (folder / SEARCH_FILE).write_text(settings.to_json())
    (folder / "report.json").write_text(json_text(report, indent=1))


def _worth(dataset: Dataset, before: Verifier, after: Verifier) -> dict[str, Any]:
    """Holds both against each other on the held-out rows: the difference of NDCG@10, and the gate's table.

    InvalidInput where the refitted one is surely worse, beyond limits that are wide.
    """
    if not len(dataset.test.user_rows):
        return {"worth": None, "gate": None}
    first, second = _measured(before, dataset), _measured(after, dataset)
    verdict = gate.verdict(first, second, _LIMITS)
    failed = [row for row in verdict.rows if row.verdict == "FAIL"]
    if failed:
        figures = ", ".join(f"{row.figure} {row.reference:.4f} -> {row.candidate:.4f}" for row in failed)
        raise InvalidInput(f"it is worse on the held-out rows, though it has learned from them: {figures}")
    return {
        "worth": vars(paired_difference(first.gains, second.gains, first.users)),
        "gate": verdict.to_json(),
    }


def _measured(verifier: Verifier, dataset: Dataset) -> Measured:
    """Measures a release on the held-out next items and impressions."""
    tasks = () if dataset.test_impressions is None else measure_tasks(verifier, dataset.test_impressions)
    return replace(measure_ranking(verifier, dataset.test), tasks=tasks)


def new_items(inputs: Inputs, dataset: Dataset, verified: Path, refitted: Path) -> dict[str, Any]:
    """Counts the items whose first event the verified model had not learned from, and says how many of them
    are in somebody's list before and after the refit, and which share of all places they take."""
    counts = [
        np.bincount(training_histories(one)[1], minlength=dataset.num_items + 1)
        for one in (open_dataset(inputs["verified_data"]), dataset)
    ]
    rows = np.flatnonzero((counts[0] == 0) & (counts[1] > 0))
    found: dict[str, Any] = {"items": len(rows), "users": min(_ASKED, dataset.num_users)}
    for name, folder in (("before", verified), ("after", refitted)):
        shown = _shown(folder, dataset, found["users"])
        is_new = np.isin(shown, rows)
        found[name] = {
            "shown": len(np.unique(shown[is_new])) / max(1, len(rows)),
            "places": float(is_new.mean()) if len(shown) else 0.0,
        }
    return found


def _shown(folder: Path, dataset: Dataset, num_users: int) -> Array:
    """Gives the rows of all items that a staged release shows evenly chosen users, as it would serve them."""
    places = np.unique(np.linspace(0, dataset.num_users - 1, num_users).astype(np.int64))
    release = StagedRelease(folder)
    batch, top_k = release.schema.sizes.max_batch, min(_TOP_K, release.schema.sizes.max_top_k)
    try:
        pipeline = LocalPipeline(release)
        lists = [
            pipeline.recommend([*dataset.user_ids[places[start : start + batch]]], {"top_k": top_k})
            for start in range(0, len(places), batch)
        ]
    finally:
        release.close()
    ids = np.concatenate([answer["item_ids"].ravel() for answer in lists]).astype("S")
    return 1 + np.searchsorted(dataset.item_ids, ids[ids != b""])


def _markdown(inputs: Inputs, refit: dict[str, Any]) -> str:
    """Writes the report's part on the refit."""
    spans = [read_span(inputs[name]) for name in ("encoders", "ranker")]
    lines = [
        "",
        "## Refit on all that is known",
        "",
        "The figures above are of the verified model. What is served has gone on from it: its encoders have "
        f"learned from {spans[0].events:,} events up to {spans[0].words()}, its ranker from "
        f"{spans[1].events:,} rows up to {spans[1].words()}.",
    ]
    if worth := refit["worth"]:
        how = "not seen" if refit["keeps_test"] else "learned from: so this only says that it is sane"
        lines += [
            "",
            f"NDCG@10 of the held-out rows, which it has {how}: {worth['mean']:+.4f}, 95% interval "
            f"[{worth['low']:+.4f}, {worth['high']:+.4f}].",
        ]
    new = refit["new_items"]
    if new["items"]:
        before, after = new["before"], new["after"]
        lines += [
            "",
            f"New items, whose first event is in the held-out part: {new['items']:,}. In the lists of "
            f"{new['users']:,} users {before['shown']:.1%} of them are shown before, "
            f"{after['shown']:.1%} after; of all places they take {before['places']:.2%} and "
            f"{after['places']:.2%}.",
        ]
    return "\n".join(lines) + "\n"

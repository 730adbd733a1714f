"""Measures the user encoder alone against the item-transition kNN and recall: a build without its ranker.

    python -m builders.bench.user_encoder SHOP --out DIR [--preset base] [--set NAME=VALUE …] [--seed 0]
        [--test]

DIR gets the stages data, encoders and index of SHOP's build; what is there is made anew. Printed, as JSON:
the encoders' learning curve, the CPU seconds of the three stages, and HR@10, NDCG@10 and recall@N of each
way on the validation targets, full ranking, all that a user has had left out. Choose settings by these;
--test adds the test targets, for once the choice is made. Recall's weights are fitted on the validation
targets, so its figures there are too good.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from builders import metrics
from builders.bench.recall_stages import recall_parser, recall_stages
from builders.data.dataset import Dataset, Targets, open_dataset
from builders.export.verifier import all_had, knn_scores, rank_unseen
from builders.index.offline import OfflineRecall
from builders.index.stage import open_recall
from builders.settings import named_preset
from ensemble.arrays import Array
from ensemble.errors import PeregrineError
from ensemble.json_text import json_text

_BATCH = 256


def measure(folders: dict[str, Path], dataset: Dataset, targets: Targets) -> dict[str, dict[str, float]]:
    """Asks about every target: {way: {figure: value}}."""
    offline, embeddings = open_recall(folders, dataset)
    parts = []
    for start in range(0, len(targets.user_rows), _BATCH):
        piece = slice(start, start + _BATCH)
        users, ends = targets.user_rows[piece], targets.history_ends[piece]
        parts.append(_ranks(offline, embeddings, users, ends, targets.item_rows[piece]))
    num_candidates = dataset.schema.sizes.candidates
    return {
        way: _figures(np.concatenate([part[way] for part in parts]), num_candidates)
        for way in (parts[0] if parts else ())
    }


def _ranks(
    offline: OfflineRecall, embeddings: Array, users: Array, ends: Array, wanted: Array
) -> dict[str, Array]:
    """Ranks the wanted items [B] of users [B] at their ends [B] by each way: {way: ranks [B]}."""
    seen = offline.recall.sizes.seen
    had = all_had(offline.dataset.histories, users, ends, seen)
    query = offline.encode_users(users, ends)
    scores = np.matmul(embeddings, query.transpose(0, 2, 1)).max(axis=2)
    return {
        "user_encoder": rank_unseen(scores, had, wanted),
        "transition_knn": rank_unseen(knn_scores(offline.recall, had[:, -seen:]), had, wanted),
        "recall": metrics.ranks_from_lists(offline.candidates_for(query, users, ends)[0], wanted),
    }


def _figures(ranks: Array, num_candidates: int) -> dict[str, float]:
    figures = {
        "ndcg@10": metrics.ndcg(ranks, 10),
        "hr@10": metrics.hit_rate(ranks, 10),
        f"recall@{num_candidates}": metrics.recall_at(ranks, num_candidates),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures, and prints JSON."""
    parser = recall_parser(__doc__)
    parser.add_argument("--test", action="store_true")
    given = parser.parse_args(arguments)
    try:
        chosen, begun = named_preset(given.preset, given.changes), time.process_time()
        folders = recall_stages(given.shop, given.out, chosen, given.seed, keep_encoders=False)
        told: dict[str, Any] = {"cpu_seconds_of_stages": round(time.process_time() - begun)}
        told["encoders"] = json.loads((folders["encoders"] / "report.json").read_text())
        dataset = open_dataset(folders["data"])
        told["validation"] = measure(folders, dataset, dataset.validation)
        if given.test:
            told["test"] = measure(folders, dataset, dataset.test)
        print(json_text(told, indent=1))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Writes a release's report.md: what `verify` measured, for people."""

from __future__ import annotations

from typing import Any

from builders.data.dataset import Dataset

WAYS = {
    "chain": "the whole chain (what is served)",
    "recall": "recall, all sources",
    "user_encoder": "user encoder alone, full ranking",
    "transition_knn": "item-transition kNN",
    "popularity": "popularity",
}


def markdown(dataset: Dataset, found: dict[str, Any]) -> str:
    """Writes the report as a page of Markdown."""
    ranking = found["ranking"]
    lines = [
        f"# {dataset.schema.shop}",
        "",
        f"{dataset.num_items:,} items, {dataset.num_users:,} users, {len(dataset.histories.item_rows):,} "
        "positive events.",
        "",
    ]
    lines += [
        f"## Ranking of {ranking['users']:,} held-out next items",
        "",
        "Full ranking over the catalogue; what a user has seen is left out; ties count half.",
        "",
    ]
    if ranking.get("repeats"):
        lines += [
            f"{ranking['repeats']:.1%} of them are items that the user has had before. No way shows these, "
            "so they are missed in all.",
            "",
        ]
    lines += _table(
        ["", *next(iter(ranking["ways"].values()), {})],
        [[WAYS[name], *(f"{v:.4f}" for v in of.values())] for name, of in ranking["ways"].items()],
    )
    if "chain_minus_recall_ndcg@10" in ranking:
        d = ranking["chain_minus_recall_ndcg@10"]
        lines += [
            "",
            f"Chain minus recall, NDCG@10: {d['mean']:+.5f}, 95% interval [{d['low']:+.5f}, "
            f"{d['high']:+.5f}] (paired bootstrap over users).",
        ]
    if "tasks" in found:
        columns = sorted({column for of in found["tasks"].values() for column in of})
        lines += [
            "",
            "## Tasks on held-out impressions",
            "",
            *_table(
                ["task", *columns],
                [[task, *(_number(of.get(c)) for c in columns)] for task, of in found["tasks"].items()],
            ),
        ]
    else:
        lines += [
            "",
            "This shop has no labels: the ranker's probability is calibrated only relative to recall's "
            "candidates plus uniform negatives.",
        ]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

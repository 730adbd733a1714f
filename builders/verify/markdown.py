"""Writes a release's report.md: what `verify` measured, for people. What lists are worth comes first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builders.data.dataset import Dataset
from builders.search.page import search_note, search_table
from builders.verify.baselines import baseline_lines
from builders.verify.data_facts import data_notes, data_table
from builders.verify.first_clicks import first_click_lines
from builders.verify.newcomers import newcomer_lines
from builders.verify.shown import variety_note, variety_table

WAYS = {
    "chain": "the whole chain (what is served)",
    "recall": "recall, all sources",
    "user_encoder": "user encoder alone, full ranking",
    "transition_knn": "item-transition kNN",
    "popularity": "popularity",
}
WORTH_WAYS = {
    "chain": "this release (what is served)",
    "recall": "recall's own order",
    "popularity": "the most popular items",
    "random": "any items",
    "logged": "what the shop itself showed",
    "knowable": "the best that could be known",
    "best": "the best possible",
}
NEXT_ITEMS = (
    "What a user took next, looked for among all items: hr@k is the share of users who find it among the "
    "first k, ndcg@k counts higher places more, recall@N says whether it was among the candidates at all. A "
    "good list may well lack it, as users would have liked other items too: these figures compare ways, not "
    "shops."
)


_CALIBRATION = (
    "ece is how far probabilities are from how often things come true; ece_by_chance how far right ones "
    "would be on so few rows: not more than that is no fault."
)


_HOW = {
    "propensities": "by what became of the items that it would have shown too, weighted by one over the "
    "chance with which each was shown",
    "truth": "by the planted truth of this generated shop; nothing is shown that the user has had",
    "places": "by what became of the item, corrected for how much its old and its new place are looked at",
    "replay": "by what became of the item. What the shop put first was looked at more, in its favour",
}


def markdown(dataset: Dataset, found: dict[str, Any]) -> str:
    """Writes the report as a page of Markdown."""
    lines = [f"# {dataset.schema.shop}", "", *_worth(found), *_next_items(found["ranking"])]
    lines += [
        *_tasks(found.get("tasks")),
        *(baseline_lines(found) if "baselines" in found else []),
        *source_lines(found.get("recall", {})),
        *(newcomer_lines(found["newcomers"]) if found.get("newcomers") else []),
        *_shown(found.get("shown")),
        *_data(found.get("data")),
        *first_click_lines(found.get("first_clicks", {})),
        *_search(found.get("search")),
        "",
        f"{dataset.num_items:,} items, {dataset.num_users:,} users, {len(dataset.histories.item_rows):,} "
        "positive events.",
    ]
    return "\n".join(lines) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """Says in a sentence what a release's lists are worth; empty for a report without a word on it."""
    worth, ranking = report.get("worth") or {}, report.get("ranking") or {}
    if worth.get("kind") == "truth":
        best = worth["ways"]["chain"]["worth"] / (worth["ways"]["best"]["worth"] or 1.0)
        return (
            f"A list of {worth['places']} that this release shows is worth {_times(worth, 'popularity')} a "
            f"list of the most popular items, {_times(worth, 'recall')} what recall alone would show, and "
            f"{best:.0%} of the best possible list."
        )
    if worth.get("kind") == "propensities":
        return (
            f"By {worth['rows']:,} logged exposures, what this release would have shown is worth "
            f"{_times(worth, 'logged')} what the shop showed, {_times(worth, 'popularity')} the most popular "
            f"items, and {_times(worth, 'recall')} what recall alone would show."
        )
    if worth.get("kind") == "places":
        return (
            f"Put into this release's order, {worth['rows']:,} lists that the shop had shown would have been "
            f"worth {_times(worth, 'logged')} as much as they were, {_times(worth, 'popularity')} what they "
            f"would be with the most popular items first, and {_times(worth, 'recall')} recall's order."
        )
    if worth.get("kind") == "replay":
        logged = (
            f", {_times(worth, 'logged')} what the shop had put first" if "logged" in worth["ways"] else ""
        )
        return (
            f"Of items shown together at {worth['rows']:,} moments, those that this release puts first were "
            f"worth {_times(worth, 'popularity')} the most popular ones, {_times(worth, 'recall')} recall's "
            f"first{logged}."
        )
    if not worth or not ranking.get("users"):
        return ""
    hits = {way: f"{100 * of['hr@10']:.1f}" for way, of in ranking["ways"].items()}
    return (
        f"Of 100 held-out users, {hits['chain']} find the item that they took next among the ten that this "
        f"release shows, {hits['popularity']} among the ten most popular ones; what lists are worth cannot "
        f"be told: {worth['why']}."
    )


def worth_shortfalls(worth: Mapping[str, Any]) -> list[str]:
    """Says in a line each what the shown lists are surely worth less than: simpler ways, never the bounds."""
    ways = worth.get("ways", {})
    return [
        f"what is shown is worth {ways['chain']['worth']:.4f} an item, below {WORTH_WAYS[way]}, "
        f"{ways[way]['worth']:.4f}"
        for way in ("recall", "popularity", "logged", "random")
        if way in ways and worth["chain_minus"][way]["high"] < 0
    ]


def worth_note(worth: Mapping[str, Any]) -> str:
    """Says how a worth was measured, and how sure it is."""
    weights = " + ".join(f"{weight:g} {task}" for task, weight in worth["weights"].items())
    differences = "; ".join(
        f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] against {WORTH_WAYS[way]}"
        for way in ("popularity", "recall", "logged")
        if (found := worth["chain_minus"].get(way))
    )
    how = _HOW[worth["kind"]]
    return (
        f"The worth of an item shown to a user is {weights}, {how}. Differences of this release, with 95% "
        f"intervals (paired bootstrap over {worth['users']:,} held-out users): {differences}."
        + _estimates(worth)
    )


def _estimates(worth: Mapping[str, Any]) -> str:
    """Names what other estimators say of this release, where there are any."""
    told = [
        f"{name.replace('_', ' ')} {of['value']:.4f} [{of['low']:.4f}, {of['high']:.4f}]"
        for name, of in worth.get("estimates", {}).items()
    ]
    rows = next((of["effective_rows"] for of in worth.get("estimates", {}).values()), 0)
    return f" Estimates of its worth: {', '.join(told)}; as sure as {rows:,.0f} rows." if told else ""


def worth_table(worth: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Gives head and rows of the table of ways, the best first, and what this release is worth more than
    each, with its interval."""
    ways = sorted(worth["ways"].items(), key=lambda way: -way[1]["worth"])
    rows = [
        [
            WORTH_WAYS.get(name, name),
            *(f"{value:.4f}" for value in of.values()),
            _sure(worth["chain_minus"][name]) if name in worth["chain_minus"] else "",
        ]
        for name, of in ways
    ]
    return ["", *worth["ways"]["chain"], "this release minus it"], rows


def _times(worth: Mapping[str, Any], way: str) -> str:
    """Writes how many times as much the chain is worth: "1.28 times (1.25 to 1.31)"."""
    found = worth["chain_times"][way]
    if None in found.values():
        return "any number of times (it is worth nothing)"
    return f"{found['value']:.2f} times ({found['low']:.2f} to {found['high']:.2f})"


def _worth(found: dict[str, Any]) -> list[str]:
    """Writes the page's opening."""
    lines = [f"**{text}**", ""] if (text := headline(found)) else []
    worth = found.get("worth", {})
    if worth.get("ways"):
        lines += ["## What the lists are worth", "", worth_note(worth), "", *_table(*worth_table(worth)), ""]
    return lines


def _next_items(ranking: dict[str, Any]) -> list[str]:
    """Writes the part on held-out next items."""
    lines = [f"## Ranking of {ranking['users']:,} held-out next items", "", NEXT_ITEMS, ""]
    lines += ["Full ranking over the catalogue; what a user has seen is left out; ties count half.", ""]
    if ranking.get("repeats"):
        lines += [
            f"{ranking['repeats']:.1%} of them are items that the user has had before. No way shows these, "
            "so they are missed in all.",
            "",
        ]
    lines += _table(
        ["", *next(iter(ranking["ways"].values()), {})],
        [[WAYS.get(name, name), *(f"{v:.4f}" for v in of.values())] for name, of in ranking["ways"].items()],
    )
    if "chain_minus_recall_ndcg@10" in ranking:
        d = ranking["chain_minus_recall_ndcg@10"]
        lines += [
            "",
            f"Chain minus recall, NDCG@10: {d['mean']:+.5f}, 95% interval [{d['low']:+.5f}, "
            f"{d['high']:+.5f}] (paired bootstrap over users).",
        ]
    return lines


def source_lines(recall: Mapping[str, Any]) -> list[str]:
    """Writes the part on recall's sources: what each adds, which were tried and left out, how many places
    each has and why."""
    rows = recall.get("sources") or []
    lines = _quota_lines(recall.get("tried_quotas"))
    for tried in recall.get("tried_sources") or []:
        if not tried["kept"]:
            told = tried.get("why") or ", ".join(f"{name} {_sure(of)}" for name, of in tried["gain"].items())
            lines += ["", f"Source {tried['source']} was tried and left out: {told}."]
    if not rows:
        return lines
    names = list(rows[0]["adds"])
    table = [
        [of["source"], _number(of["quota"]), _number(of["weight"]), *(_sure(of["adds"][n]) for n in names)]
        for of in rows
    ]
    head = ["source", "places kept", "weight", *(f"adds {name}" for name in names)]
    why = (
        f"What recall's own order loses without each source, on {rows[0]['users']:,} held-out users that its "
        "weights were fitted on (95% intervals; the other sources weigh the same)."
    )
    return ["", "## What each source of recall adds", "", why, "", *_table(head, table), *lines]


def _quota_lines(tried: Mapping[str, Any] | None) -> list[str]:
    """Says which places of sources' own were chosen, and why; nothing of a release of before."""
    if not tried:
        return []
    if "why" in tried:
        return ["", f"No other places of sources' own were tried: {tried['why']}."]
    gain = ", ".join(f"{name} {_sure(of)}" for name, of in tried["gain"].items())
    judged = ", ".join(f"{name} {_sure(of)}" for name, of in tried["judged"].items())
    ways = [
        f"{name} {places} of its own instead of {before}"
        for (name, places), before in zip(tried["best"].items(), tried["before"].values(), strict=True)
        if places != before
    ]
    if not ways:
        return ["", "Other places of sources' own were tried: none reach more of the held-out items."]
    became = "was taken" if tried["kept"] else "was tried and left out"
    return [
        "",
        f"Places among the candidates: {', '.join(ways)} {became}: {gain}. The best of one half of these "
        f"{tried['users']:,} held-out users gain on the other half: {judged}.",
    ]


def _sure(of: Mapping[str, float]) -> str:
    """Writes a difference with its interval."""
    return f"{of['mean']:+.4f} [{of['low']:+.4f}, {of['high']:+.4f}]"


def _tasks(tasks: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    """Writes the part on the ranker's tasks."""
    if tasks is None:
        return [
            "",
            "This shop has no labels: the ranker's probability is calibrated only relative to recall's "
            "candidates plus uniform negatives.",
        ]
    names = sorted({name for of in tasks.values() for name in of})  # a line each: 80 columns hold that
    rows = [[name, *(_number(of.get(name)) for of in tasks.values())] for name in names]
    return [
        "",
        "## Tasks on held-out impressions",
        "",
        *_table(["", *tasks], rows),
        "",
        calibration_note(tasks),
    ]


def calibration_note(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """Explains the tasks' calibration errors, where there are any."""
    return _CALIBRATION if any("ece_by_chance" in of for of in tasks.values()) else ""


def _shown(shown: Mapping[str, Any] | None) -> list[str]:
    """Writes the part on what lists show, whatever they hit."""
    if not shown:
        return []
    table = _table(*variety_table(shown, WAYS))
    return ["", "## What the lists show", "", variety_note(shown), "", *table]


def _search(search: Mapping[str, Any] | None) -> list[str]:
    """Writes the part on what a search finds."""
    if not search:
        return []
    return ["", "## Search", "", search_note(search), "", *_table(*search_table(search))]


def _data(data: Mapping[str, Any] | None) -> list[str]:
    """Writes the part on the shop's data and its split."""
    if not data:
        return []
    split, *lacks = data_notes(data)
    told = ["", *(f"- {one}" for one in lacks)] if lacks else []
    return ["", "## What it was made of", "", split, "", *_table(*data_table(data)), *told]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

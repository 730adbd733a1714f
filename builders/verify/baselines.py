"""Asks simple ways about the same rows and users as the model: what is served must be worth more than these.

Tasks, on the test impressions:
  - **two rates**: the smoothed rates of the user and of the item that were known at the time of the row, as a
    product of odds (naive Bayes); for numbers, the two smoothed means added.
  - **boosting**: histogram gradient boosting (Ke et al., NeurIPS 2017, in scikit-learn's form) on the plain
    features of plain_features.py; it learns from a sample of the rows before the test period.
Lists, on the held-out next items: recall's order, popularity and the item-transition kNN, which `verify` asks
anyway. Every figure has an interval by a bootstrap over users, and every difference from the model one by the
same resamples. Where the model is below a baseline there is a line that says so.

Axes: E test impressions, Q held-out targets, T tasks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders import bootstrap, metrics
from builders.data.dataset import Dataset, Impressions
from builders.verify.plain_features import Plain, joined, plain_features
from ensemble.arrays import Array
from ensemble.bootstrap import Spread, Statistic, groups, ratio, spreads, user_rows, user_sums
from ensemble.schema import Task

SAMPLE_ROWS = 200_000  # boosting learns from at most so many
NAMES = {
    "two_rates": "two smoothed rates",
    "unplaced": "the ranker that does not know the place",
    "boosting": "gradient boosting",
    "recall": "recall's own order",
    "popularity": "popularity",
    "transition_knn": "the item-transition kNN",
}
_FEWEST = 20  # rows of the rarer class that boosting wants, and lists that a mean place wants
_BOOSTING = {
    "max_iter": 150,
    "learning_rate": 0.05,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 50,
    "l2_regularization": 1.0,
    "early_stopping": False,
    "random_state": 0,
}
_AT_ONCE = 60_000_000  # impressions times resamples: keeps the bootstrap within seconds


def task_baselines(
    dataset: Dataset, values: Array, placed: Array | None = None, sample_rows: int = SAMPLE_ROWS
) -> dict[str, Any]:
    """Compares the model's values [E, T] of the test impressions with the baselines': a report as plain data.

    Boosting knows the places where the shop logs them. So does the model then: `placed` [E, T] are its values
    at them, and those that it serves stand beside.

    {"tasks": {task: {"rows", "figure", "ways": {way: {"value", "low", "high"}}, "gain": {baseline: {"mean",
    "low", "high"}}}}, "boosting": what it learned from}. A gain above 0 says that the model is better.
    """
    test = dataset.test_impressions
    if test is None or not len(test.times):
        return {"tasks": {}}
    every = joined((dataset.train_impressions, dataset.validation_impressions, test))
    before = len(every.times) - len(test.times)
    known = every.labels[:before]
    averages = np.nanmean(np.where(np.isnan(known).all(0), 0, known), axis=0)
    sample = np.arange(before)
    if before > sample_rows:
        sample = np.sort(np.random.default_rng(0).permutation(before)[:sample_rows])
    asked = np.concatenate([sample, np.arange(before, len(every.times))])
    plain = _varying(plain_features(dataset, every, asked, averages), len(sample))
    table = _Table(plain, every.labels[sample], averages)
    tasks = {}
    for at, task in enumerate(dataset.schema.tasks):
        ways = {"model": values[:, at], **table.ways(at, task)}
        if placed is not None:
            ways |= {"model": placed[:, at], "unplaced": values[:, at]}
        tasks[task.name] = compared(task, test, at, ways)
    if not has_boosting():
        return {"tasks": tasks}
    library = f"scikit-learn {importlib.metadata.version('scikit-learn')}"
    facts = {"rows": len(sample), "of": before, "features": list(plain.names), "library": library}
    return {"tasks": tasks, "boosting": facts}


def has_boosting() -> bool:
    """Says whether scikit-learn is there; the extra `build` brings it, an older environment lacks it."""
    return importlib.util.find_spec("sklearn") is not None


@dataclass(frozen=True)
class _Table:
    """Holds plain features: first of the sample that boosting learns from, then of the test impressions."""

    plain: Plain
    labels: Array  # [sample, T]
    averages: Array  # [T]

    def ways(self, at: int, task: Task) -> dict[str, Array]:
        """Gives each baseline's values of the test impressions [E] for the task of index `at`."""
        rates = self.plain.rates[len(self.labels) :, at]
        if task.kind == "binary":
            odds = _log_odds(rates).sum(1) - _log_odds(self.averages[at])
            together = 1 / (1 + np.exp(-odds))
        else:
            together = rates.sum(1) - self.averages[at]
        boosted = self._boosted(at, task)
        return {"two_rates": together, **({} if boosted is None else {"boosting": boosted})}

    def _boosted(self, at: int, task: Task) -> Array | None:
        """Fits boosting to the sample's rows of the task; None where there are too few to learn from."""
        labels = self.labels[:, at]
        rows, is_binary = np.flatnonzero(~np.isnan(labels)), task.kind == "binary"
        rarer = min((labels == 1).sum(), (labels == 0).sum()) if is_binary else len(rows)
        if rarer < _FEWEST or not self.plain.names or not has_boosting():
            return None
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        kind = HistGradientBoostingClassifier if is_binary else HistGradientBoostingRegressor
        model = kind(categorical_features=self.plain.is_category, **_BOOSTING)
        model.fit(self.plain.values[rows], labels[rows])
        asked = self.plain.values[len(labels) :]
        return model.predict_proba(asked)[:, 1] if is_binary else model.predict(asked)


def _varying(plain: Plain, count: int) -> Plain:
    """Leaves out features that have one value, or none, in the first `count` rows: they tell nothing."""
    values = plain.values[:count]
    unknown = np.isnan(values)
    low = np.where(unknown, np.inf, values).min(0, initial=np.inf)
    keep = low < np.where(unknown, -np.inf, values).max(0, initial=-np.inf)
    names = tuple(name for name, kept in zip(plain.names, keep, strict=True) if kept)
    return Plain(names, plain.values[:, keep], plain.is_category[keep], plain.rates)


def _log_odds(rates: Array) -> Array:
    rates = np.clip(rates, 1e-9, 1 - 1e-9)
    return np.log(rates) - np.log1p(-rates)


def compared(task: Task, test: Impressions, at: int, ways: dict[str, Array]) -> dict[str, Any]:
    """Gives each way's figure on the rows where the task is defined, and what the model gains on each."""
    rows = np.flatnonzero(~np.isnan(test.labels[:, at]))
    figure = "auc" if task.kind == "binary" else "rmse"
    found: dict[str, Any] = {"rows": len(rows), "figure": figure, "ways": {}, "gain": {}}
    if not len(rows):
        return found
    num_users, group = groups(test.user_rows[rows])
    labels = test.labels[rows, at].astype(np.float64)
    kind: Callable[..., Statistic] = bootstrap.auc if figure == "auc" else bootstrap.rmse
    statistics = [kind(labels, values[rows].astype(np.float64), group, num_users) for values in ways.values()]
    samples = int(np.clip(_AT_ONCE // len(rows), 100, 1000))
    measured = dict(zip(ways, spreads(statistics, num_users, width=len(rows), samples=samples), strict=True))
    found["ways"] = {way: _spread(of) for way, of in measured.items()}
    sign = 1 if figure == "auc" else -1
    for way, of in measured.items():
        if way != "model":
            found["gain"][way] = _spread(_minus(measured["model"], of, sign))
    if figure == "auc":
        found |= _reciprocal(test, rows, labels, ways)
    return found


def _reciprocal(test: Impressions, rows: Array, labels: Array, ways: dict[str, Array]) -> dict[str, Any]:
    """Gives the mean reciprocal place of the first positive in the lists shown; {} where there are few."""
    shown = test.user_rows[rows], test.times[rows], labels
    places = {way: first_places(*shown, values[rows]) for way, values in ways.items()}
    if len(places["model"]) < _FEWEST:
        return {}
    means = {way: float((1 / of).mean()) for way, of in places.items()}
    return {"lists": len(places["model"]), "mrr": means}


def first_places(user_rows: Array, times: Array, labels: Array, values: Array) -> Array:
    """Gives the best place, from 1, of a positive in each list that has one and something beside it: [L].

    A list is what one user was shown at one time; ties count half. All [E].
    """
    order = np.lexsort((-values, times, user_rows))
    owner, when, score = user_rows[order], times[order], values[order]
    new = np.ones(len(order), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (when[1:] != when[:-1])
    lists = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    changed = new.copy()
    changed[1:] |= score[1:] != score[:-1]
    runs = np.flatnonzero(changed)
    lengths = np.diff(np.append(runs, len(order)))
    place = np.repeat(runs - starts[lists[runs]] + (lengths + 1) / 2, lengths)
    best = np.full(len(starts), np.inf)
    positive = labels[order] == 1
    np.minimum.at(best, lists[positive], place[positive])
    return best[np.isfinite(best) & (np.diff(np.append(starts, len(order))) > 1)]


def ranking_baselines(users: Array, ranks: dict[str, Array]) -> dict[str, Any]:
    """Gives HR@10 and NDCG@10 of each way of users [Q] with intervals, and the chain's gain on the others.

    {figure: {"ways": {way: ...}, "gain": {way: ...}}}; empty where nobody was asked.
    """
    if not len(users):
        return {}
    num_users, group = groups(users)
    counts, found = user_rows(group, num_users), {}
    for figure, worth in (("hr@10", metrics.hits), ("ndcg@10", metrics.gains)):
        statistics = [ratio(user_sums(group, worth(of, 10), num_users), counts) for of in ranks.values()]
        measured = dict(zip(ranks, spreads(statistics, num_users), strict=True))
        chain = measured["chain"]
        found[figure] = {
            "ways": {way: _spread(of) for way, of in measured.items()},
            "gain": {way: _spread(_minus(chain, of, 1)) for way, of in measured.items() if way != "chain"},
        }
    return found


def shortfalls(baselines: dict[str, Any]) -> list[str]:
    """Says in a line each where a task is below a baseline, or the served list below recall, popularity or
    the kNN; an empty list says that nothing is."""
    lines = []
    if baselines["tasks"] and "boosting" not in baselines:
        lines.append("boosting was not asked: scikit-learn is not installed; cure: pip install scikit-learn")
    for name, task in baselines["tasks"].items():
        figure, worse = task["figure"].upper(), "below" if task["figure"] == "auc" else "above"
        for way, gain in task["gain"].items():
            if way != "unplaced" and (gain["value"] or 0) < 0:
                own, other = task["ways"]["model"]["value"], task["ways"][way]["value"]
                what = f"{figure} {own:.4f} is {worse} that of {NAMES[way]}, {other:.4f}"
                lines.append(f"{name}: the ranker's {what}{_chance(gain)}")
    for figure, of in baselines["ranking"].items():
        for way, gain in of["gain"].items():
            if way in NAMES and gain["value"] < 0:
                own, other = of["ways"]["chain"]["value"], of["ways"][way]["value"]
                what = f"{figure.upper()} {own:.4f} is below that of {NAMES[way]}, {other:.4f}"
                lines.append(f"next item: the served list's {what}{_chance(gain)}")
    return lines


_BY_EXPOSURE = (
    "this shop logs what it showed, and its next items are of its own lists: where they chose the blend, "
    "each counted by one over the chance that it was shown; as they are, they favour whoever repeats the shop"
)


def blend_lines(report: dict[str, Any]) -> list[str]:
    """Says where a ranker's report has the tasks out of the order of lists, and by what its power was chosen
    where that is not next items as they were; else gives none."""
    fitted = report.get("blend", {})
    tried = fitted.get("tried")
    if "why" in fitted:
        return [f"{fitted['why']}; it is {fitted['power']:g}"]
    lines = [_BY_EXPOSURE] if fitted.get("by_exposure") else []
    if not tried or tried[report["blend"]["chosen"]]["uses_tasks"]:
        return lines
    return [
        *lines,
        "ranking gained nothing on held-out next items and conversions, so lists are in recall's order; "
        "a request that weighs a task has it ranked all the same",
    ]


def baseline_lines(report: dict[str, Any]) -> list[str]:
    """Writes the part of report.md that says what simple ways make of the same rows and users."""
    lines = ["", "## Beside simple ways, on the same rows and users", ""]
    lines += [f"- {line}." for line in report["shortfalls"]]
    lines += [] if report["shortfalls"] else ["Nothing is below a baseline."]
    found = report["baselines"]
    rows = [
        [f"{name}, {task['figure']}: {way}", _interval(of), _interval(task["gain"].get(way))]
        for name, task in found["tasks"].items()
        for way, of in task["ways"].items()
    ]
    rows += [
        [f"next item, {figure}: {way}", _interval(value), _interval(of["gain"].get(way))]
        for figure, of in found["ranking"].items()
        for way, value in of["ways"].items()
    ]
    head = ["", "value [95% interval]", "gain of what is served"]
    lines += ["", *("| " + " | ".join(row) + " |" for row in (head, ["---"] * 3, *rows))] if rows else []
    if "boosting" in found:
        of = found["boosting"]
        lines += [
            "",
            f"Boosting: {of['library']}, {len(of['features'])} plain features, learned from {of['rows']:,} "
            f"of {of['of']:,} impressions before the test. Intervals: bootstrap over users.",
        ]
    return lines


def _interval(of: dict[str, Any] | None) -> str:
    if of is None or of["value"] is None:
        return ""
    return (
        f"{of['value']:.4f} [{of['low']:.4f}, {of['high']:.4f}]"
        if of["low"] is not None
        else f"{of['value']:.4f}"
    )


def _chance(gain: dict[str, Any]) -> str:
    if gain["high"] is not None and gain["high"] < 0:
        return ""
    return " (which may be chance)"


def _minus(first: Spread, second: Spread, sign: int) -> Spread:
    """Gives sign * (first - second) in the same resamples."""
    return Spread(sign * (first.value - second.value), sign * (first.samples - second.samples))


def _spread(of: Spread) -> dict[str, float | None]:
    return {"value": _finite(of.value), "low": _finite(of.low), "high": _finite(of.high)}


def _finite(value: float) -> float | None:
    """Gives None for what the data cannot give: JSON knows no NaN."""
    return float(value) if np.isfinite(value) else None

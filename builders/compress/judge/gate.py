"""Says what users lost by compression, how sure that is, and whether the release may be served.

Each figure has a limit and a paired bootstrap (ensemble/bootstrap.py). FAIL: the whole 95% interval of the
loss lies beyond the limit. WARN: the loss itself does, but chance could be why. A release without a FAIL
passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from builders import bootstrap as figures
from builders.compress.judge.judge import Judged, overlaps
from builders.compress.judge.measure import TOP_K, Measured, TaskOutcome, Timing
from builders.compress.recipe import Gate
from builders.compress.results import NodePrecision
from ensemble import bootstrap
from ensemble.arrays import Array
from ensemble.bootstrap import Spread
from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

ALPHA = 0.025  # one-sided: the lower end of a 95% interval
# times the reference from which an engine is called slower: one engine against itself stays within 8% on a
# busy machine
SLOWER = 1.1
_COLUMNS = ("figure", "users", "uncompressed", "compressed", "loss", "95% interval", "limit", "verdict")


@dataclass(frozen=True)
class GateRow:
    """Holds one figure. `loss` is relative (a share of the reference) or absolute, positive = worse."""

    figure: str
    users: int
    reference: float
    candidate: float
    loss: float
    low: float
    high: float
    limit: float
    relative: bool
    verdict: str  # ok | WARN | FAIL | reported (too few users, or not defined)

    def cells(self) -> list[str]:
        """Writes the figure as texts, in the order of the table's columns."""
        show = (lambda value: f"{value:+.2%}") if self.relative else (lambda value: f"{value:+.5f}")
        limit = f"{self.limit:.2%}" if self.relative else f"{self.limit:.5f}"
        interval = f"{show(self.low)} … {show(self.high)}"
        return [
            self.figure,
            f"{self.users:,}",
            f"{self.reference:.5f}",
            f"{self.candidate:.5f}",
            show(self.loss),
            interval,
            limit,
            self.verdict,
        ]


@dataclass(frozen=True)
class Verdict:
    """Holds all rows, and the engines' times beside those of the uncompressed release."""

    rows: tuple[GateRow, ...]
    timings: tuple[Timing, ...] = ()

    @property
    def ok(self) -> bool:
        return not any(row.verdict == "FAIL" for row in self.rows)

    @property
    def slower(self) -> tuple[Timing, ...]:
        """Engines that compression made slower: their higher precision should be kept."""
        return tuple(timing for timing in self.timings if timing.ratio > SLOWER)

    def to_json(self) -> dict[str, Any]:
        """Gives {"ok", "rows", "timings"} for JSON; a figure that is not defined is null."""
        rows = [
            {name: _jsonable(value) for name, value in dataclasses.asdict(row).items()} for row in self.rows
        ]
        return {
            "ok": self.ok,
            "rows": rows,
            "timings": [{**dataclasses.asdict(t), "ratio": t.ratio} for t in self.timings],
        }

    def markdown(self) -> str:
        """Writes the table, and a line for each engine that became slower."""
        lines = [
            "| " + " | ".join(row) + " |"
            for row in (_COLUMNS, ["---"] * len(_COLUMNS), *(row.cells() for row in self.rows))
        ]
        slower = [
            f"{t.model} at batch {t.batch}: {t.ms:.2f} ms, slower than the {t.reference_ms:.2f} ms of the "
            "higher precision"
            for t in self.slower
        ]
        return "\n".join([*lines, *([""] if slower else []), *slower]) + "\n"

    def table(self) -> Table:
        """Makes the table for the console."""
        from rich.table import Table

        table = Table(
            title="The gate: what held-out users lose by compression",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for place, column in enumerate(_COLUMNS):
            table.add_column(
                column, justify="right" if 0 < place < len(_COLUMNS) - 1 else "left", no_wrap=True
            )
        colours = {"FAIL": "bold red", "WARN": "yellow", "reported": "dim"}
        for row in self.rows:
            table.add_row(*row.cells(), style=colours.get(row.verdict))
        return table

    def require(self, nodes: Sequence[NodePrecision] = ()) -> None:
        """InvalidInput with the table and the nodes to lift, the most sensitive first, unless ok."""
        if self.ok:
            return
        failed = ", ".join(row.figure for row in self.rows if row.verdict == "FAIL")
        raise InvalidInput(
            f"compression loses more than the gate allows: {failed}\n\n{self.markdown()}\ncure: "
            f"{_cure(nodes)}; or widen [gate]"
        )


def _cure(nodes: Sequence[NodePrecision]) -> str:
    """Names the nodes to lift: of those that are low, the ones that alone change most."""
    low = [node for node in nodes if node["precision"] != "fp32" and node["changed"] is not None]
    worst = sorted(low, key=lambda node: -((node["changed"] or 0) + max(node["loss"] or 0, 0)))[:3]
    if not worst:
        return "compress less: a smaller budget, prune a smaller share, distil a larger student"
    lines = [
        f"{n['model']}'s {n['node']} ({n['precision']} on {n['runtime']}, alone it changes "
        f"{n['changed']:.1%} of the lists)"
        for n in worst
    ]
    pinned = f'pinned = {{"{worst[0]["node"]}" = "fp32", …}}'
    return f"lift the most sensitive nodes by the recipe's {pinned}: {', '.join(lines)}"


def verdict(
    reference: Measured,
    candidate: Measured,
    limits: Gate | None = None,
    *,
    keeps_weights: bool = False,
    seed: int = 0,
) -> Verdict:
    """Holds the compressed release against the uncompressed one, on the same users. keeps_weights: only
    precision changed, so the shown items must hardly change either."""
    limits = limits or Gate()
    if not np.array_equal(reference.users, candidate.users) or len(reference.tasks) != len(candidate.tasks):
        raise InvalidInput(
            "the gate compares two releases of one shop, measured on the same held-out users; these were not"
        )
    rows = _ranking_rows(reference, candidate, limits, keeps_weights, seed)
    for before, after in zip(reference.tasks, candidate.tasks, strict=True):
        rows += _task_rows(before, after, limits, seed)
    return Verdict((*rows, *_slice_rows(reference, candidate, limits, seed)), candidate.timings)


def _ranking_rows(
    reference: Measured, candidate: Measured, limits: Gate, keeps_weights: bool, seed: int
) -> list[GateRow]:
    users, group = bootstrap.groups(reference.users)
    named = [
        (f"NDCG@{TOP_K}", reference.gains, candidate.gains),
        (f"HR@{TOP_K}", reference.hits, candidate.hits),
    ]
    named.append((f"recall@{reference.num_candidates}", reference.recalled, candidate.recalled))
    sums = [[bootstrap.user_sums(group, values, users) for values in pair] for _, *pair in named]
    statistics = [figures.relative_loss(*pair) for pair in sums]
    if keeps_weights:
        changed = bootstrap.user_sums(group, 1 - overlaps(reference.lists, candidate.lists), users)
        statistics.append(bootstrap.ratio(changed, bootstrap.user_rows(group, users)))
    spreads = bootstrap.spreads(statistics, users, samples=limits.samples, seed=seed)
    rows = [
        _row(name, users, (_mean(before), _mean(after)), spread, limits.ranking, relative=True)
        for (name, before, after), spread in zip(named, spreads, strict=False)
    ]
    if keeps_weights:
        rows.append(
            _row(
                f"top-{TOP_K} overlap",
                users,
                (1.0, 1 - spreads[-1].value),
                spreads[-1],
                1 - limits.overlap,
                relative=True,
            )
        )
    return rows


def finding_rows(model: str, before: Judged, after: Judged, limits: Gate, seed: int) -> list[GateRow]:
    """Compares what an encoder's queries find: NDCG and recall of their own items, and the lists, which are
    only told: which of much the same items comes first is no loss."""
    queries, group = bootstrap.groups(np.arange(len(before.gains)))
    changed = 1 - overlaps(before.lists, after.lists)
    pairs = {"NDCG": (before.gains, after.gains), "R": (before.gains > 0, after.gains > 0)}
    sums = [
        [bootstrap.user_sums(group, np.asarray(values, np.float64), queries) for values in pair]
        for pair in pairs.values()
    ]
    ratio = bootstrap.ratio(bootstrap.user_sums(group, changed, queries), bootstrap.user_rows(group, queries))
    statistics = [*(figures.relative_loss(*pair) for pair in sums), ratio]
    spreads = bootstrap.spreads(statistics, queries, samples=limits.samples, seed=seed)
    rows = [
        _row(
            f"{model} {name}@{TOP_K}",
            queries,
            (_mean(one), _mean(other)),
            spread,
            limits.ranking,
            relative=True,
        )
        for (name, (one, other)), spread in zip(pairs.items(), spreads, strict=False)
    ]
    told = _row(
        f"{model} top-{TOP_K} overlap", queries, (1.0, 1 - spreads[-1].value), spreads[-1],
        1 - limits.overlap, relative=True,
    )  # fmt: skip
    return [*rows, dataclasses.replace(told, verdict="reported")]


def _task_rows(before: TaskOutcome, after: TaskOutcome, limits: Gate, seed: int) -> list[GateRow]:
    """Compares AUC and ECE of a binary task, RMSE of a regression."""
    if not len(before.labels):
        return []
    users, group = bootstrap.groups(before.users)

    if before.kind == "binary":
        kinds = [("AUC", figures.auc, -1.0, limits.auc), ("ECE", figures.ece, 1.0, limits.ece)]
    else:
        kinds = [("RMSE", figures.rmse, 1.0, limits.ranking)]
    relative = before.kind != "binary"
    statistics = [
        kind(of.labels, of.values, group, users) for _, kind, _, _ in kinds for of in (before, after)
    ]
    spreads = bootstrap.spreads(statistics, users, width=len(group), samples=limits.samples, seed=seed)
    rows = []
    for place, (name, _, sign, limit) in enumerate(kinds):
        first, second = spreads[2 * place : 2 * place + 2]
        loss = _change(first, second, sign, relative=relative)
        rows.append(
            _row(f"{name} {before.name}", users, (first.value, second.value), loss, limit, relative=relative)
        )
    return rows


def _change(first: Spread, second: Spread, sign: float, *, relative: bool) -> Spread:
    """Says what got worse in each resample. sign 1: more is worse; -1: less is."""
    unit = (first.value, first.samples) if relative else (1.0, 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value, samples = (
            sign * (after - before) / of
            for after, before, of in zip(_both(second), _both(first), unit, strict=True)
        )
    return Spread(float(value), np.asarray(samples))


def _both(spread: Spread) -> tuple[Any, Any]:
    return np.float64(spread.value), spread.samples


def _slice_rows(reference: Measured, candidate: Measured, limits: Gate, seed: int) -> list[GateRow]:
    """Compares NDCG@10 in each slice; those of enough users are gated together (Holm 1979)."""
    users, group = bootstrap.groups(reference.users)
    names = [name for name, mask in reference.slices.items() if mask.any()]
    masks = [reference.slices[name] for name in names]
    statistics = [
        figures.relative_loss(
            *(bootstrap.user_sums(group, of.gains * mask, users) for of in (reference, candidate))
        )
        for mask in masks
    ]
    # the smallest p-value that resamples can show must lie below Holm's strictest threshold
    enough = int(2 * len(masks) / ALPHA)
    found = bootstrap.spreads(statistics, users, samples=max(limits.samples, enough), seed=seed)
    sizes = [len(np.unique(reference.users[mask])) for mask in masks]
    gated = [size >= limits.slice_users for size in sizes]
    failed = holm(
        [
            spread.chance_within(limits.slices) if in_gate else None
            for spread, in_gate in zip(found, gated, strict=True)
        ]
    )
    rows = []
    for name, mask, spread, size, in_gate, fails in zip(
        names, masks, found, sizes, gated, failed, strict=True
    ):
        row = _row(
            name,
            size,
            (_mean(reference.gains[mask]), _mean(candidate.gains[mask])),
            spread,
            limits.slices,
            relative=True,
        )
        verdict = (
            "reported" if not in_gate else "FAIL" if fails else "WARN" if row.loss > limits.slices else "ok"
        )
        rows.append(dataclasses.replace(row, verdict=verdict))
    return rows


def holm(chances: Sequence[float | None], alpha: float = ALPHA) -> list[bool]:
    """Says which hypotheses fall when all are tested together; p-values, None = not tested.

    The smallest comes first, against alpha / those left.
    """
    tested = sorted((chance, place) for place, chance in enumerate(chances) if chance is not None)
    rejected = [False] * len(chances)
    for done, (chance, place) in enumerate(tested):
        if chance > alpha / (len(tested) - done):
            break
        rejected[place] = True
    return rejected


def _row(
    figure: str, users: int, both: tuple[float, float], loss: Spread, limit: float, *, relative: bool
) -> GateRow:
    low, high = loss.low, loss.high
    verdict = (
        "FAIL"
        if low > limit
        else "WARN"
        if loss.value > limit
        else "ok"
        if np.isfinite(loss.value)
        else "reported"
    )
    return GateRow(figure, users, *both, loss.value, low, high, limit, relative, verdict)


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value

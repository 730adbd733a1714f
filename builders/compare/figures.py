"""Figures of `peregrine compare`, in the style of builders/report/figures.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from builders.compare.losses import LossTable, mean_and_error
from builders.compare.precisions import PrecisionsPoint, PrecisionsTable
from builders.report.figures import BLUE, GREY, INK, PALE, RED, SKY, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = {
    "uncompressed": (INK, "*", 120, "fp32"),
    "planner": (BLUE, "o", 34, "planner"),
    "global": (RED, "s", 30, "global 8 bits"),
}


def losses_figure(found: LossTable) -> Figure:
    """Draws each choice of losses: mean and standard error over seeds (blue), and every seed (pale)."""
    from matplotlib import pyplot as plt

    rows = found.rows[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 1.4 + 0.3 * len(rows)), layout="constrained", sharey=True)
    _dots(axes[0], [row.ndcg for row in rows])
    _dots(axes[1], [row.overlap for row in rows])
    axes[0].axvline(100, color=RED, linestyle=(0, (4, 3)), linewidth=1)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows], color=INK)
    axes[0].set_xlabel("NDCG@10, % of the teacher's")
    axes[1].set_xlabel("shown items that are the teacher's, %")
    share, seeds = found.parameters / found.teacher_parameters, len(found.seeds)
    axes[0].set_title(
        f"{found.model}: students of {share:.0%} of the teacher's parameters, {seeds} "
        f"seed{'s' * (seeds != 1)}"
    )
    return figure


def _dots(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for place, values in enumerate(rows):
        mean, error = mean_and_error(values)
        axes.plot(
            [100 * value for value in values],
            [place] * len(values),
            "o",
            color=SKY,
            markersize=3.5,
            alpha=0.8,
            linewidth=0,
        )
        axes.errorbar(
            100 * mean,
            place,
            xerr=None if error is None else 100 * error,
            fmt="o",
            color=BLUE,
            markersize=6,
            capsize=3,
            linewidth=1.5,
        )
        axes.annotate(
            f"{100 * mean:.2f}",
            (100 * mean, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            size=7.5,
            color=BLUE,
        )
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.1)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.grid(axis="x", color="#EEEEEE", zorder=0)


def precisions_figure(found: PrecisionsTable) -> Figure:
    """Draws changed items and lost NDCG@10, with its standard error, against size and latency.

    Latency is left out where it was not timed.
    """
    from matplotlib import pyplot as plt

    columns = [("size of the engine, % of fp32's", [100 * point.size for point in found.points])]
    if all(point.latency is not None for point in found.points):
        columns.append(
            ("time of 8 users, % of fp32's", [100 * (point.latency or 0.0) for point in found.points])
        )
    figure, panels = plt.subplots(
        2,
        len(columns),
        figsize=(4.9 * len(columns) + 0.4, 6.6),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    changed, lost = (
        [100 * point.changed for point in found.points],
        [100 * point.loss for point in found.points],
    )
    errors = [100 * point.loss_error for point in found.points]
    for place, (label, x) in enumerate(columns):
        _points(panels[0][place], found.points, x, changed, None)
        _points(panels[1][place], found.points, x, lost, errors)
        panels[1][place].set_xlabel(label)
    panels[0][0].set_ylabel("shown items that are others, %")
    panels[1][0].set_ylabel("NDCG@10 lost, % ± standard error")
    panels[0][0].legend(frameon=False, fontsize=8, loc="upper right")
    panels[0][0].set_title(f"{found.model} on {found.runtime}: the planner beside global 8 bits")
    return figure


def _points(
    axes: Axes,
    points: Sequence[PrecisionsPoint],
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float] | None,
) -> None:
    """Draws one panel's points, each family in its look, and the front: what no other beats in both."""
    best = front(x, y)
    axes.step(
        [x[i] for i in best],
        [y[i] for i in best],
        where="post",
        color=PALE,
        linewidth=1.4,
        zorder=1,
        label="Pareto front",
    )
    for family, (colour, marker, area, name) in _LOOKS.items():
        own = [i for i, point in enumerate(points) if point.family == family]
        axes.scatter(
            [x[i] for i in own],
            [y[i] for i in own],
            s=area,
            c=colour,
            marker=marker,
            linewidths=0,
            zorder=3,
            label=name,
        )
        if errors:
            axes.errorbar(
                [x[i] for i in own],
                [y[i] for i in own],
                [errors[i] for i in own],
                fmt="none",
                ecolor=colour,
                alpha=0.35,
                capsize=2,
                zorder=2,
            )
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    axes.grid(axis="y", color="#EEEEEE", zorder=0)

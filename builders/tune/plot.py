"""Draws a study: what each trial was worth, and each one's validation by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builders.report.figures import BLUE, GREY, INK, ORANGE, PALE, axes_of, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_of(report: Mapping[str, Any]) -> bytes:
    """Draws a study's report (tune.py) as a PNG."""

    def draw() -> Figure:
        figure, axes = axes_of(8.5, 3.2, 2)
        _values(axes[0], report)
        _epochs(axes[1], report)
        return figure

    return png(draw)


def _values(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draws a dot a trial, the best until then, and the preset that the search began from."""
    done = [one for one in report["trials"] if one["value"] is not None]
    numbers, values = [one["trial"] for one in done], [one["value"] for one in done]
    best = [max(values[: place + 1]) for place in range(len(values))]
    start, best_trial = report["start"], report["best"]
    axes.axhline(start["value"], color=GREY, linewidth=1, linestyle="--", label=f"preset {start['preset']}")
    axes.step(numbers, best, where="post", color=BLUE, linewidth=1.2, label="best so far")
    axes.scatter(numbers, values, color=INK, s=16, zorder=3, label="a trial")
    axes.scatter([best_trial["trial"]], [best_trial["value"]], color=ORANGE, s=48, zorder=4, label="the best")
    pruned = [one["trial"] for one in report["trials"] if one["state"] == "pruned"]
    if pruned:
        floor = min([*values, start["value"]])
        axes.scatter(pruned, [floor] * len(pruned), color=GREY, marker="x", s=20, label="given up early")
    axes.set_title("Worth by trial" if report["figure"] == "worth" else "NDCG@10 by trial")
    axes.set_xlabel("trial")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, fontsize=7)


def _epochs(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draws each trial's validation by epoch; those that were given up are grey."""
    for one in report["trials"]:
        epochs = sorted((int(epoch), value) for epoch, value in one["epochs"].items())
        if not epochs:
            continue
        is_best, is_done = one["trial"] == report["best"]["trial"], one["value"] is not None
        axes.plot(
            *zip(*epochs, strict=True),
            color=ORANGE if is_best else BLUE if is_done else PALE,
            marker="o",
            markersize=2.5,
            linewidth=1.6 if is_best else 0.8,
            zorder=3 if is_best else 1,
        )
    axes.set_title("Validation by epoch")
    axes.set_xlabel("epoch (orange: the best; grey: given up)")
    axes.locator_params(axis="x", integer=True)

"""Draws what was measured: latency over throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemble.errors import InvalidInput

# Okabe and Ito: told apart by the colour-blind too
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"


def write_plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draws latency over throughput into a PNG file; InvalidInput if it cannot be written.

    Open loops have p50 and p99, closed loops p50, each beside what twins without a server do.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _draw_loops(axes, figures)
    _draw_twins(axes, figures["lone"]["twin"], figures["saturation"]["twins"])
    _label(axes, figures)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--plot {path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)


def _draw_loops(axes: Any, figures: Mapping[str, Any]) -> None:
    """Draws a line for each kind of loop, and writes at each closed loop how many requests are in flight."""
    _line(axes, figures["open"], "p99_ms", "open loop, p99", _ORANGE, "o-")
    _line(axes, figures["open"], "p50_ms", "open loop, p50", _BLUE, "o-")
    queued = [{**row["twins"], "achieved_per_s": row["achieved_per_s"]} for row in figures["open"]]
    _line(axes, queued, "p99_ms", "twins behind one queue, p99", _GREEN, "o:")
    _line(axes, figures["closed"], "p50_ms", "closed loop, p50 (label: requests in flight)", _GREY, "s:")
    for row in figures["closed"]:
        place, style = (row["achieved_per_s"], row["p50_ms"]), {"color": _GREY, "size": 8}
        axes.annotate(str(row["concurrency"]), place, textcoords="offset points", xytext=(5, -11), **style)
    if figures["perf_analyzer"]:
        _line(axes, figures["perf_analyzer"], "p50_ms", "perf_analyzer, p50", _PURPLE, "^:")


def _draw_twins(axes: Any, twin: Mapping[str, Any], twins: Mapping[str, Any]) -> None:
    """Draws the lone twin's latency and the throughput of one twin a core."""
    latency = f"twin alone, p50: {twin['p50_ms']:.1f} ms"
    axes.axhline(twin["p50_ms"], color=_GREEN, linestyle="--", linewidth=1, label=latency)
    throughput = (
        f"{twins['processes']} twins at once: {twins['users_per_s']:.0f} users/s "
        f"(batch {twins['batch_size']:.1f})"
    )
    axes.axvline(twins["users_per_s"], color=_GREEN, linestyle="-.", linewidth=1, label=throughput)


def _label(axes: Any, figures: Mapping[str, Any]) -> None:
    """Labels the axes, and says in the title what was measured where."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xlabel("answered requests per second (one user each)")
    axes.set_ylabel("latency, ms (log scale)")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2)
    release, machine = figures["release"], figures["machine"]
    subject = f"{release['shop']}, {release['items']:,} items, {release['candidates']} candidates"
    axes.set_title(f"{subject}\n{machine['cpu']}, {machine['cores']} cores, {figures['date'][:10]}", size=10)


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, style: str
) -> None:
    """Draws one figure of each row over its throughput."""
    points = [(row["achieved_per_s"], row[key]) for row in rows if row.get(key)]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)

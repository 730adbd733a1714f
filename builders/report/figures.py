"""Figures of a release's report, as PNG. Colours are Okabe and Ito's, told apart by the colour-blind too."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#767676", "#D0D0D0"
BLUE, SKY, ORANGE, RED, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"
PRECISIONS = {"int8": ORANGE, "fp8": "#CC79A7", "fp16": SKY, "fp32": BLUE}
_FAMILIES = {
    "uncompressed": (INK, "*", 150),
    "planner": (BLUE, "o", 46),
    "global": (RED, "s", 46),
    "qat": (GREEN, "^", 52),
    "prune": (ORANGE, "D", 36),
    "distil": ("#CC79A7", "P", 56),
}
_VERDICTS = {"ok": BLUE, "WARN": ORANGE, "FAIL": RED, "reported": GREY}
_MOST_NODES, _FAR = 40, 3.0
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "figure.dpi": 150,
}


def png(draw: Callable[[], Figure]) -> bytes:
    """Draws the figure that `draw` makes as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = draw()
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        plt.close(figure)
    return out.getvalue()


def axes_of(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Makes a figure of so many inches, with panels side by side."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def worth(ways: Mapping[str, Mapping[str, float]], names: Mapping[str, str]) -> Figure:
    """Draws what an item shown is worth in each way, best on top."""
    values = {way: of["worth"] for way, of in ways.items()}
    return _bars(values, names, "worth of an item shown to a held-out user")


def ranking(
    ways: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    sure: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Draws NDCG@10 of each way of ranking, best on top, with its interval where `sure` has one."""
    values = {way: of["ndcg@10"] for way, of in ways.items()}
    known = {way: of for way, of in (sure or {}).items() if way in values and of.get("low") is not None}
    lines = "; lines: 95% intervals" if known else ""
    figure = _bars(values, names, f"NDCG@10, full ranking of held-out next items{lines}")
    [axes] = figure.axes
    for place, way in enumerate(sorted(values, key=lambda way: values[way])):
        if of := known.get(way):  # below the middle, where the value stands
            axes.hlines(place - 0.22, of["low"], of["high"], color=GREY, linewidth=1.2)
    axes.set_xlim(0, max([axes.get_xlim()[1], *(1.04 * of["high"] for of in known.values())]))
    return figure


def calibration(tasks: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draws a reliability diagram of each task: how often what was foretold came true, with its interval."""
    figure, panels = axes_of(3.4 * len(tasks) + 0.4, 3.4, len(tasks))
    for axes, (task, points) in zip(panels, tasks.items(), strict=True):
        foretold, rate = ([point[of] for point in points] for of in ("foretold", "rate"))
        far = 1.08 * max(*foretold, *(point["high"] for point in points), 1e-6)
        axes.plot([0, far], [0, far], color=PALE, linewidth=1, zorder=1)
        low, high = ([point[of] for point in points] for of in ("low", "high"))
        axes.vlines(foretold, low, high, color=SKY, linewidth=2)
        axes.plot(foretold, rate, "o-", color=BLUE, markersize=4.5, linewidth=1)
        axes.set(title=task, xlim=(0, far), ylim=(0, far), xlabel="foretold", aspect="equal")
    panels[0].set_ylabel("came true")
    return figure


def _bars(value_of: Mapping[str, float], names: Mapping[str, str], label: str) -> Figure:
    """Draws a bar for each way, the greatest on top, the chain's in colour."""
    order = sorted(value_of, key=lambda way: value_of[way])
    figure, [axes] = axes_of(7, 0.6 + 0.34 * len(order))
    values = [value_of[way] for way in order]
    axes.barh(
        range(len(order)), values, color=[BLUE if way == "chain" else PALE for way in order], height=0.62
    )
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.4f}", va="center", size=8.5)
    axes.set_yticks(range(len(order)), [names.get(way, way) for way in order], color=INK)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, max([*values, 1e-6]) * 1.12)
    axes.set_xlabel(label)
    return figure


def learning(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws each model's training loss above its validation, by epoch; the kept epoch is marked."""
    from matplotlib import pyplot as plt

    size = (5.2 * len(models), 4.2)
    figure, rows = plt.subplots(2, len(models), figsize=size, layout="constrained", squeeze=False)
    for (name, of), panels in zip(models.items(), rows.T, strict=True):
        for axes, key, colour in zip(panels, ("loss", "validation"), (GREY, BLUE), strict=True):
            known = [entry for entry in of["curve"] if key in entry]
            axes.plot(
                [entry["epoch"] for entry in known],
                [entry[key] for entry in known],
                color=colour, marker="o", markersize=3.5, linewidth=1.4,
            )  # fmt: skip
            axes.axvline(of["kept_epoch"], color=RED, linestyle=(0, (4, 3)), linewidth=1)
            axes.set_xlim(-0.3, of["epochs"] + 0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color="#EEEEEE")
        panels[0].set(title=name, ylabel="training loss")
        panels[1].set(xlabel="epoch (dashed: kept)", ylabel=of["metric"].replace(" of ", "\nof "))
    return figure


def pareto(variants: Sequence[Mapping[str, Any]], limit: float) -> Figure:
    """Loss against size, and against latency where it was measured: every variant of one model on one
    runtime."""
    timed = [variant for variant in variants if variant["latency_ms"] is not None]
    figure, panels = axes_of(10.5 if timed else 6.2, 4.2, 2 if timed else 1)
    _scatter(panels[0], variants, [variant["bytes"] / 1e6 for variant in variants], limit)
    panels[0].set(xlabel="size of the engine, MB", title="Loss against size")
    if timed:
        _scatter(panels[1], timed, [variant["latency_ms"] for variant in timed], limit)
        panels[1].set(xlabel="latency at batch 8, ms", title="Loss against latency")
    panels[0].set_ylabel("NDCG@10 lost, % of the uncompressed")
    return figure


def _scatter(axes: Axes, variants: Sequence[Mapping[str, Any]], x: Sequence[float], limit: float) -> None:
    y = [100 * variant["loss"] for variant in variants]
    _limits(axes, x, y, limit)
    best = front(x, y)
    axes.step([x[i] for i in best], [y[i] for i in best], where="post", color=PALE, linewidth=1.2, zorder=1)
    axes.axhline(100 * limit, color=RED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.annotate(
        f"the gate's limit, {100 * limit:g}%",
        (1, 100 * limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color=RED,
        size=8,
        ha="right",
    )
    for variant, right, up in zip(variants, x, y, strict=True):
        colour, marker, area = _FAMILIES.get(variant["family"], (GREY, "o", 40))
        axes.scatter(right, up, s=area, c=colour, marker=marker, zorder=3, linewidths=0)
        if variant["chosen"]:
            axes.scatter(right, up, s=190, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=4)
    _labels(axes, variants, x, y, limit)
    axes.grid(axis="y", color="#EEEEEE", zorder=0)


def _limits(axes: Axes, x: Sequence[float], y: Sequence[float], limit: float) -> None:
    """Sets the axes: from 0 on the right, with room for labels on all sides."""
    low, high = min([*y, 0.0]), max([*y, 100 * limit])
    axes.set_xlim(0, max(x) * 1.18)
    axes.set_ylim(low - 0.09 * (high - low), high + 0.12 * (high - low))


def front(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Places that no other beats in both, from left to right."""
    found: list[int] = []
    for place in sorted(range(len(x)), key=lambda i: (x[i], y[i])):
        if not found or y[place] < y[found[-1]]:
            found.append(place)
    return found


def _labels(
    axes: Axes,
    variants: Sequence[Mapping[str, Any]],
    x: Sequence[float],
    y: Sequence[float],
    limit_share: float,
) -> None:
    """Puts each point's name in the first of eight places where it covers neither a point nor a name."""
    from matplotlib.patheffects import withStroke

    to_pixels = axes.transData.transform
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # the layout settles
    unit = axes.figure.dpi / 72  # type: ignore[union-attr]
    points = to_pixels(list(zip(x, y, strict=True)))
    taken = [(px - 6 * unit, py - 6 * unit, px + 6 * unit, py + 6 * unit) for px, py in points]
    left_end, bottom_end, right_end, top_end = axes.bbox.extents
    limit = to_pixels((0, 100 * limit_share))[1]
    taken.append((right_end - 85 * unit, limit, right_end, limit + 12 * unit))  # the limit's own label
    for place in sorted(range(len(x)), key=lambda i: not variants[i]["chosen"]):
        name = variants[place]["name"] + (" (chosen)" if variants[place]["chosen"] else "")
        width, height = 4.4 * unit * len(name), 10 * unit
        for right, up in ((9, 0), (-9, 0), (0, 11), (0, -11), (9, 10), (9, -10), (-9, 10), (-9, -10)):
            left = points[place][0] + right * unit - (width if right < 0 else width / 2 if right == 0 else 0)
            bottom = points[place][1] + up * unit - height / 2
            box = (left, bottom, left + width, bottom + height)
            inside = (
                box[0] >= left_end
                and box[2] <= right_end + 8 * unit
                and box[1] >= bottom_end
                and box[3] <= top_end + 8 * unit
            )
            if inside and not any(
                box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
            ):
                taken.append(box)
                colour = _FAMILIES.get(variants[place]["family"], (GREY, "o", 40))[0]
                side = "right" if right < 0 else "center" if right == 0 else "left"
                text = axes.annotate(
                    name,
                    (x[place], y[place]),
                    xytext=(right, up),
                    textcoords="offset points",
                    size=8,
                    color=colour,
                    ha=side,
                )
                text.set(va="center", path_effects=[withStroke(linewidth=2.5, foreground="white")])
                break


def most_sensitive_first(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts by how much of the lists each changes alone; those that were not lowered come last."""
    return sorted(nodes, key=lambda node: (node["changed"] is None, -(node["changed"] or 0)))


def precision_map(nodes: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws one bar a node: how much of the lists it changes alone, coloured by the precision it got.

    The most sensitive is on top.
    """
    order = most_sensitive_first(nodes)
    shown = order[:_MOST_NODES][::-1]
    figure, [axes] = axes_of(8.5, 1.1 + 0.215 * len(shown))
    changes = [100 * (node["changed"] or 0.0) for node in shown]
    axes.barh(
        range(len(shown)),
        changes,
        color=[PRECISIONS.get(node["precision"], GREY) for node in shown],
        height=0.72,
    )
    span = max([*changes, 0.1])
    for place, (node, change) in enumerate(zip(shown, changes, strict=True)):
        axes.text(change + 0.008 * span, place, _beside(node), va="center", size=7, color=GREY)
    axes.set_yticks(
        range(len(shown)), [f"{_short(node['node'])}  {node['op']}" for node in shown], color=INK, size=7.5
    )
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1.3 * span), ylim=(-0.7, len(shown) - 0.3))
    rest = f" ({len(order) - len(shown)} less sensitive nodes not shown)" if len(order) > len(shown) else ""
    axes.set_xlabel(f"shown items that are others when this node alone is at its lowest precision, %{rest}")
    found = [precision for precision in PRECISIONS if any(node["precision"] == precision for node in order)]
    for place, precision in enumerate(found[::-1]):
        count = sum(node["precision"] == precision for node in order)
        axes.text(
            1,
            0.02 + place * 0.24 / figure.get_figheight(),
            f"■ {precision}: {count} node{'s' * (count != 1)}",
            transform=axes.transAxes,
            color=PRECISIONS[precision],
            ha="right",
            va="bottom",
            size=9,
            weight="bold",
        )
    return figure


def _beside(node: Mapping[str, Any]) -> str:
    if node["changed"] is None:
        return f"{node['precision']}  {node['reason']}"
    lost = round(-node["loss"], 4) or 0.0  # no "-0.00%"
    return f"{node['precision']}  NDCG@10 {lost:+.2%}"


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else name[: most // 2 - 1] + "…" + name[-most // 2 :]


def gate(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws each figure's loss and its 95% interval, in units of its limit: right of 1 is over it."""
    shown = [row for row in rows if row["loss"] is not None and row["low"] is not None][::-1]
    figure, [axes] = axes_of(8.5, 1.1 + 0.27 * max(1, len(shown)))
    near = -min(_FAR, max([0.5, *(-row["low"] / row["limit"] for row in shown)]))
    axes.axvspan(1, _FAR, color=RED, alpha=0.06, linewidth=0)
    axes.axvline(0, color=PALE, linewidth=0.8)
    axes.axvline(1, color=RED, linestyle=(0, (4, 3)), linewidth=1)
    for place, row in enumerate(shown):
        colour = _VERDICTS[row["verdict"]]
        low, middle, high = (
            min(max(row[name] / row["limit"], near), _FAR) for name in ("low", "loss", "high")
        )
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.45)
        axes.plot(middle, place, "o", color=colour, markersize=5.5, clip_on=False)
        value = f"{row['loss']:+.2%}" if row["relative"] else f"{row['loss']:+.4f}"
        for right, text, side in ((72, value, "right"), (80, row["verdict"], "left")):
            axes.annotate(
                text,
                (_FAR, place),
                xytext=(right - 20, 0),
                textcoords="offset points",
                va="center",
                ha=side,
                size=8,
                color=colour,
            )
    axes.set_yticks(
        range(len(shown)), [f"{row['figure']}  ({row['users']:,})" for row in shown], color=INK, size=8
    )
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(near, _FAR), ylim=(-0.7, len(shown) - 0.3))
    axes.set_xlabel(
        "loss as a share of its limit, with the 95% interval (in brackets: users); cut at 3 limits"
    )
    return figure


def latency(timings: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds of each engine at each batch, before (grey) and after (coloured), on a log axis."""
    figure, [axes] = axes_of(8.5, 1.2 + 0.34 * len(timings))
    for place, timing in enumerate(timings[::-1]):
        before, after = timing["reference_ms"], timing["ms"]
        colour = BLUE if after <= before else RED
        axes.plot([before, after], [place, place], color=colour, linewidth=2, alpha=0.35, zorder=1)
        axes.plot(before, place, "o", color=GREY, markersize=6)
        axes.plot(after, place, "o", color=colour, markersize=7)
        times = before / after
        text = f"{times:.2f}× faster" if times >= 1 else f"{1 / times:.2f}× slower"
        axes.annotate(
            f"{after:.3g} ms, {text}",
            (max(before, after), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            size=8,
            color=colour,
        )
    axes.set_yticks(
        range(len(timings)), [f"{t['model']}, batch {t['batch']}" for t in timings[::-1]], color=INK
    )
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xscale("log")
    every = [value for timing in timings for value in (timing["ms"], timing["reference_ms"])]
    axes.set(xlim=(min(every) / 1.4, max(every) * 4.5), ylim=(-0.6, len(timings) - 0.4))
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#EEEEEE", zorder=0)
    axes.set_xlabel("milliseconds a batch (log scale), one thread; grey: uncompressed")
    return figure

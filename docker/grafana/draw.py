"""Draws the dashboards as one PNG, for whoever has no Grafana.

    python docker/grafana/draw.py http://HOST:9090 --out dashboards.png --minutes 60

Each panel's queries are asked of Prometheus (`query_range`) as Grafana would ask them, with its step and its
`$__rate_interval`; units, legends, stacks and thresholds are the panel's.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "dashboards"
_TIMEOUT_S = 30.0
_POINTS = 240  # a panel's width; Grafana asks for no more points than it has pixels, either
_COLUMNS, _WIDTH, _HEIGHT, _DPI = 4, 4.2, 2.9, 80  # inches of a panel
_MOST_LINES, _LONGEST = 8, 30  # of a legend; what is more is counted, or cut
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F6A00", "#767676")
_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.fontsize": 7,
}


class DrawError(Exception):
    """Says in one line what is in the way, and the cure."""


@dataclass(frozen=True)
class Span:
    """Is the time that is drawn: Unix seconds, and seconds between two points and for `rate`."""

    start_s: float
    end_s: float
    step_s: float
    rate_s: float


@dataclass(frozen=True)
class Line:
    """Is one series: its legend, Unix seconds [P], and values [P], float, NaN where there is none."""

    legend: str
    times_s: list[float]
    values: list[float]


# --- Prometheus


class Prometheus:
    """Asks Prometheus' HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = (url if "//" in url else f"http://{url}").rstrip("/")

    def get(self, path: str, **parameters: object) -> Any:
        """Gives the `data` of an answer; DrawError where there is none."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace").strip()[:300]
            raise DrawError(f"{self.url} refuses {path} of {parameters.get('query')!r}: {reason}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DrawError(f"{self.url} answers no {path} ({error}); cure: Prometheus' address") from None

    def scrape_s(self, at_s: float) -> float:
        """Gives the longest interval, in seconds, at which servers are scraped that were there at a time."""
        found = self.get("query", query="last_over_time(peregrine_ready[1h])", time=at_s)["result"]
        instances = {one["metric"]["instance"] for one in found}
        targets = self.get("targets", state="active")["activeTargets"]
        every = [one["scrapeInterval"] for one in targets if one["labels"].get("instance") in instances]
        if not every:
            raise DrawError(
                f"{self.url} scraped no server in that hour (peregrine_ready); cure: scrape_configs"
            )
        return max(map(_seconds, every))

    def lines(self, target: dict[str, Any], span: Span, instance: str) -> list[Line]:
        """Gives the series of one of a panel's queries."""
        query = target["expr"].replace("$instance", instance)
        query = query.replace("$__rate_interval", f"{span.rate_s:.0f}s")
        found = self.get("query_range", query=query, start=span.start_s, end=span.end_s, step=span.step_s)
        return [_line(one, target["legendFormat"], span.step_s) for one in found["result"]]


def _seconds(text: str) -> float:
    """Reads a duration as Prometheus writes it: 1m30s, 500ms."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhd])", text))


def _line(series: dict[str, Any], legend: str, step_s: float) -> Line:
    """Names a series by its labels, and breaks its line where points are missing."""
    times_s, values = list[float](), list[float]()
    for at, text in series["values"]:
        if times_s and at - times_s[-1] > 1.5 * step_s:
            times_s.append(times_s[-1] + step_s)
            values.append(math.nan)
        times_s.append(float(at))
        values.append(float(text) if math.isfinite(float(text)) else math.nan)
    name = re.sub(r"{{\s*(\w+)\s*}}", lambda found: series["metric"].get(found[1], ""), legend).strip()
    return Line(name or "all", times_s, values)


def span_of(minutes: float, scrape_s: float, end_s: float) -> Span:
    """Gives the minutes before `end_s`, with the step and the rate's window that Grafana takes."""
    step_s = max(scrape_s, math.ceil(minutes * 60 / _POINTS))
    return Span(end_s - minutes * 60, end_s, step_s, max(step_s + scrape_s, 4 * scrape_s))


# --- numbers as Grafana writes them

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, ""))
_TIMES = ((86400.0, "day"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = tuple(
    (1024.0**power, unit) for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB"), (0, "B"))
)
_RATES = {"reqps": "req/s", "ops": "ops/s", "rowsps": "rows/s"}


def _scaled(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    """Writes a number in the largest unit that it fills."""
    size, unit = next((one for one in scales if abs(value) >= one[0]), scales[-1])
    return f"{value / size:.3g} {unit}".strip() if value else "0"


FORMATS: dict[str, Callable[[float], str]] = {
    "short": lambda value: _scaled(value, _PREFIXES) if abs(value) >= 1e3 else f"{value:.3g}",
    "percentunit": lambda value: f"{value * 100:.3g}%",
    "bytes": lambda value: _scaled(value, _BYTES),
    "s": lambda value: _scaled(value, _TIMES),
    "µs": lambda value: _scaled(value * 1e-6, _TIMES),
}


def formatted(value: float, unit: str) -> str:
    """Writes a value in one of Grafana's units; DrawError for one that is not known here."""
    if suffix := _RATES.get(unit) or (unit.startswith("suffix:") and unit.removeprefix("suffix:").strip()):
        return f"{FORMATS['short'](value)} {suffix}"
    if unit not in FORMATS:
        raise DrawError(f"unit {unit!r} cannot be drawn; there are: {', '.join((*FORMATS, *_RATES))}")
    return FORMATS[unit](value)


# --- drawing


def draw_panel(axes: Axes, panel: dict[str, Any], lines: list[Line], span: Span) -> None:
    """Draws one panel; where it has no series it says so."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], wrap=True)
    if not lines:
        axes.text(0.5, 0.5, "no series", transform=axes.transAxes, ha="center", color="#D55E00")
    if defaults["custom"].get("stacking"):
        _draw_stacked(axes, lines, span)
    else:
        for place, line in enumerate(lines):
            axes.plot(line.times_s, line.values, color=_colour(place), linewidth=1)
            alone = _alone(line.values)
            axes.plot(
                [line.times_s[at] for at in alone],
                [line.values[at] for at in alone],
                ".",
                color=_colour(place),
            )
    _draw_limits(axes, defaults, lines)
    above = any(value > 0 for line in lines for value in line.values)
    _write_axes(axes, defaults["unit"], span, above)
    _write_legend(axes, lines, defaults["unit"], span)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _alone(values: list[float]) -> list[int]:
    """Finds points without a neighbour, of which a line would show nothing."""
    known = [False, *map(math.isfinite, values), False]
    return [at for at in range(len(values)) if known[at + 1] and not known[at] and not known[at + 2]]


def _draw_stacked(axes: Axes, lines: list[Line], span: Span) -> None:
    """Draws lines on top of each other; what is missing at a time counts nothing."""
    times_s = sorted({at for line in lines for at in line.times_s})
    known = [dict(zip(line.times_s, line.values, strict=True)) for line in lines]
    values = [[0.0 if math.isnan(one.get(at, 0.0)) else one.get(at, 0.0) for at in times_s] for one in known]
    if times_s:
        axes.stackplot(times_s, values, colors=[_colour(place) for place in range(len(lines))], alpha=0.6)


def _draw_limits(axes: Axes, defaults: dict[str, Any], lines: list[Line]) -> None:
    """Draws the thresholds, dashed; one that is far above all values is named instead of shown."""
    top = max((one for line in lines for one in line.values if math.isfinite(one)), default=0.0)
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if (value := step["value"]) is None:
            continue
        if value <= 3 * top or not top:
            axes.axhline(value, color="#D00000", linewidth=1, linestyle="--")
        else:
            text = f"limit: {formatted(value, defaults['unit'])} ↑"
            axes.text(1, 1, text, transform=axes.transAxes, ha="right", va="top", size=7, color="#D00000")


def _round_ticks(top: float, unit: str) -> list[float]:
    """Gives up to five values from 0 to `top` that are round in the unit that they are written in."""
    scales = _BYTES if unit == "bytes" else _TIMES if unit in ("s", "µs") else ()
    base = 1e-6 if unit == "µs" else 1.0
    scale = next((size for size, _ in scales if top * base >= size), base) / base
    rough = top / scale / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough) * scale
    return [count * step for count in range(int(top / step) + 1)]


def _write_axes(axes: Axes, unit: str, span: Span, is_above: bool) -> None:
    """Writes values in their unit, and the local time of day."""
    axes.set_xlim(span.start_s, span.end_s)
    axes.yaxis.set_major_formatter(lambda value, _: formatted(value, unit))
    axes.set_ylim(0, top := axes.get_ylim()[1] if is_above else 1.0)
    axes.set_yticks(_round_ticks(top, unit))
    ticks = [span.start_s + share * (span.end_s - span.start_s) for share in (0.1, 0.5, 0.9)]
    axes.set_xticks(ticks, [time.strftime("%H:%M", time.localtime(at)) for at in ticks])


def _write_legend(axes: Axes, lines: list[Line], unit: str, span: Span) -> None:
    """Writes under a panel what its lines are, each with its last value."""
    from matplotlib.patches import Patch

    shown = lines if len(lines) <= _MOST_LINES else lines[: _MOST_LINES - 1]
    handles = [
        Patch(color=_colour(place), label=f"{_cut(line.legend)}: {_last(line, unit, span)}")
        for place, line in enumerate(shown)
    ]
    if len(shown) < len(lines):
        handles.append(Patch(color="none", label=f"and {len(lines) - len(shown)} more"))
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.05, -0.12),
        ncols=2,
        frameon=False,
        handlelength=0.8,
        columnspacing=1,
        labelspacing=0.25,
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _last(line: Line, unit: str, span: Span) -> str:
    """Writes a line's value at the end, or a dash where it has none there."""
    is_there = line.times_s and line.times_s[-1] > span.end_s - 2 * span.step_s
    return formatted(line.values[-1], unit) if is_there and math.isfinite(line.values[-1]) else "–"


def draw(
    prometheus: Prometheus, boards: list[dict[str, Any]], span: Span, instance: str = ".*"
) -> tuple[bytes, list[str]]:
    """Draws all panels of the dashboards; gives the PNG, and each "dashboard: panel" without a series."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [math.ceil(len(board["panels"]) / _COLUMNS) for board in boards]
    size = (_COLUMNS * _WIDTH, sum(rows) * _HEIGHT + len(boards) * 0.4)
    empty = list[str]()
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(boards), 1, height_ratios=rows, squeeze=False)[:, 0]
        for board, part, count in zip(boards, parts, rows, strict=True):
            empty += _draw_board(
                part, board, count, lambda target: prometheus.lines(target, span, instance), span
            )
        return _png(figure), empty


def _draw_board(
    part: Any, board: dict[str, Any], rows: int, lines_of: Callable[[dict[str, Any]], list[Line]], span: Span
) -> list[str]:
    """Draws one dashboard; gives those of its panels that have no series."""
    part.suptitle(board["title"], fontsize=12, fontweight="bold", ha="left", x=0.01)
    places = iter(part.subplots(rows, _COLUMNS, squeeze=False).flat)
    empty = list[str]()
    for panel in board["panels"]:
        axes = next(places)
        lines = [line for target in panel["targets"] for line in lines_of(target)]
        draw_panel(axes, panel, lines, span)
        if not any(math.isfinite(value) for line in lines for value in line.values):
            empty.append(f"{board['title']}: {panel['title']}")
    for axes in places:
        axes.set_visible(False)
    return empty


def _png(figure: Figure) -> bytes:
    """Gives a figure as a PNG of 64 colours, a third of its size."""
    from PIL import Image

    raw, out = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE).save(
        out, format="png", optimize=True
    )
    return out.getvalue()


# --- the command


def read_boards(names: list[str]) -> list[dict[str, Any]]:
    """Reads dashboards by file name; all of them where none is named."""
    there = sorted(path.stem for path in FOLDER.glob("*.json"))
    if unknown := set(names) - set(there):
        raise DrawError(f"no dashboard {', '.join(sorted(unknown))}; there are: {', '.join(there)}")
    return [json.loads((FOLDER / f"{name}.json").read_text("utf-8")) for name in names or there]


def main(arguments: list[str] | None = None) -> None:
    """Draws, and says which panels are empty; exits with 2 where something is in the way."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("prometheus", help="its address, such as http://127.0.0.1:9090")
    parser.add_argument("--out", type=Path, default=Path("dashboards.png"), help="the PNG (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="how much of the past (%(default)s)")
    parser.add_argument("--end", type=datetime.fromisoformat, help="local time, as 2026-11-28T03:20 (now)")
    parser.add_argument("--instance", default=".*", help="a pattern of instances (all)")
    parser.add_argument("--board", action="append", default=[], help="one of dashboards/, repeatable (all)")
    options = parser.parse_args(arguments)
    try:
        prometheus = Prometheus(options.prometheus)
        boards = read_boards(options.board)
        end_s = options.end.timestamp() if options.end else time.time()
        span = span_of(options.minutes, prometheus.scrape_s(end_s), end_s)
        picture, empty = draw(prometheus, boards, span, options.instance)
        options.out.write_bytes(picture)
    except (DrawError, ImportError, OSError) as error:
        cure = "; cure: pip install '.[build]'" if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out}: {sum(len(board['panels']) for board in boards)} panels")
    for name in empty:
        print(f"no series in {name}")


if __name__ == "__main__":
    main()

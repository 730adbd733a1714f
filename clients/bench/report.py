"""A bench report as a table, as JSON, and as a latency-throughput plot."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PACKAGES = (
    "numpy",
    "onnxruntime",
    "faiss-cpu",
    "tritonclient",
    "grpcio",
    "nvidia-pytriton",
    "peregrine-recommender",
)
_BUSY = 0.5  # load average per core from which a machine's times are not worth publishing
_LATENCIES = ("p50_ms", "p95_ms", "p99_ms", "p999_ms")
# Okabe and Ito: told apart by the colour-blind too
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def machine() -> dict[str, Any]:
    """Where and when: command, date, machine, CPU, versions, and how busy the machine was before."""
    return {
        "command": shlex.join(["peregrine", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
            "load_average_1min": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_json(report: Mapping[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--json {path}: cannot be written: {error.strerror}") from None


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Everything that was measured, as tables."""
    m, r = report["machine"], report["release"]
    console.print(
        f"[bold]{r['shop']}[/] release {r['name']}: {r['users']:,} users, {r['items']:,} items, "
        f"{r['candidates']} candidates"
    )
    console.print(
        f"{m['cpu']}, {m['cores']} cores, load {m['load_average_1min']:.1f} before; tritonserver "
        f"{r['tritonserver']}; {report['date']}"
    )
    if m["load_average_1min"] > m["cores"] * _BUSY:
        console.print(
            "[yellow]Other work kept this machine busy: times are too long and ratios of times unsure; CPU "
            "milliseconds hold.[/]"
        )
    for table in (_versus_table(report), _load_table(report), _steps_table(report)):
        console.print(table)
    console.print(_figures_table(report))
    if report["perf_analyzer"] is None and report["options"].get("use_perf_analyzer", True):
        console.print("perf_analyzer: not found; `peregrine bench --install-perf-analyzer` gets it")


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _versus_table(report: Mapping[str, Any]) -> Table:
    """One request at a time, against the twin."""
    columns = ("p50 ms", "p99 ms", "CPU ms", "twin p50", "twin p99", "twin CPU", "p50 ratio")
    table = _table("One request at a time: Triton and its local twin", "users a request", *columns)
    pairs = [("1 (lone)", report["lone"]["triton"], report["lone"]["twin"])]
    pairs += [(str(row["batch_size"]), row["triton"], row["twin"]) for row in report["batches"]]
    for name, ours, twin in pairs:
        mine = [ours["p50_ms"], ours["p99_ms"], ours.get("cpu_ms")]
        theirs = [twin["p50_ms"], twin["p99_ms"], twin["cpu_ms_per_user"] * twin["batch_size"]]
        table.add_row(name, *map(_number, [*mine, *theirs, ours["p50_ms"] / twin["p50_ms"]]))
    return table


def _load_table(report: Mapping[str, Any]) -> Table:
    """Closed loops, open loops, perf_analyzer."""
    columns = (
        "offered/s",
        "achieved/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "p99.9 ms",
        "failed",
        "batch",
        "CPU ms",
        "of twins",
    )
    table = _table(
        "Under load (* the generator could not send in time: what it shared the machine with was measured "
        "too)",
        "load",
        *columns,
    )
    twins = report["saturation"]["twins"]["users_per_s"]
    for kind, rows in (
        ("closed", report["closed"]),
        ("open", report["open"]),
        ("perf_analyzer", report["perf_analyzer"] or []),
    ):
        for row in rows:
            name = f"{kind} {row['concurrency']}" if "concurrency" in row else kind
            name += "" if row.get("kept_up", True) else " *"
            cells = [row.get("offered_per_s"), row["achieved_per_s"], *(row.get(key) for key in _LATENCIES)]
            rest = [row.get("mean_batch"), row.get("cpu_ms"), row["achieved_per_s"] / twins]
            table.add_row(name, *map(_number, cells), str(row.get("failed", "")), *map(_number, rest))
        table.add_section()
    return table


def _steps_table(report: Mapping[str, Any]) -> Table:
    """Where a request's time goes, lone and at saturation, from Triton's statistics."""
    phases = ("queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
    table = _table(
        "Milliseconds per request and step, by Triton's statistics",
        "step",
        "batch",
        "queue",
        "input",
        "infer",
        "output",
        "twin's run",
    )
    best = max(report["closed"], key=lambda row: row["achieved_per_s"])
    for name, row, twin in (
        ("lone", report["lone"]["triton"], report["lone"]["twin"]["steps_ms"]),
        ("saturated", best, {}),
    ):
        for step in report["release"]["steps"]:
            cells = [row["steps"].get(step, {}).get(key) for key in ("mean_batch", *phases)]
            table.add_row(f"{name} {step}", *map(_number, [*cells, twin.get(step)]))
        table.add_section()
    return table


def _figures_table(report: Mapping[str, Any]) -> Table:
    """The figures that stand for the rest."""
    lone, saturation, half = report["lone"], report["saturation"], report["half"]
    table = _table("Figures", "figure", "value", "of which")
    table.add_row(
        "lone request, p50 minus twin's",
        f"{lone['added_ms']:.2f} ms",
        f"{lone['triton']['p50_ms']:.2f} − {lone['twin']['p50_ms']:.2f}",
    )
    table.add_row(
        "a hop: that, by step", f"{lone['hop_ms']:.2f} ms", f"{len(report['release']['steps'])} steps"
    )
    twins = saturation["twins"]
    rate = f"{saturation['achieved_per_s']:.0f}/s with {saturation['concurrency']} in flight; {twins['processes']} twins {twins['users_per_s']:.0f}/s"
    table.add_row("throughput at saturation, of the twins'", f"{saturation['throughput_ratio']:.2f}", rate)
    if "added_cpu_ms" in saturation:
        cpu = f"{saturation['cpu_ms']:.2f} − {twins['cpu_ms_per_user']:.2f}, mean batch {saturation['mean_batch']:.1f}"
        table.add_row(
            "CPU per request minus twin's at the same batch", f"{saturation['added_cpu_ms']:.2f} ms", cpu
        )
    if half:
        table.add_row(
            "p99 at half of saturation, of lone p50",
            f"{half['ratio']:.1f}",
            f"{half['p99_ms']:.1f} ms at {half['rate']:.0f}/s",
        )
        table.add_row(
            "the same, of the p99 of twins behind one queue",
            f"{half['twins_ratio']:.1f}",
            f"{half['twins_p99_ms']:.1f} ms, no server",
        )
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Latency over throughput: open loop p50 and p99, the closed loops' p50, the lone twin and the twins'
    throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _line(axes, report["open"], "p99_ms", "open loop, p99", _ORANGE, "o-")
    _line(axes, report["open"], "p50_ms", "open loop, p50", _BLUE, "o-")
    queued = [{**row["twins"], "achieved_per_s": row["achieved_per_s"]} for row in report["open"]]
    _line(axes, queued, "p99_ms", "twins behind one queue, p99", _GREEN, "o:")
    _line(axes, report["closed"], "p50_ms", "closed loop, p50 (label: requests in flight)", _GREY, "s:")
    for row in report["closed"]:
        axes.annotate(
            str(row["concurrency"]),
            (row["achieved_per_s"], row["p50_ms"]),
            textcoords="offset points",
            xytext=(5, -11),
            color=_GREY,
            size=8,
        )
    if report["perf_analyzer"]:
        _line(axes, report["perf_analyzer"], "p50_ms", "perf_analyzer, p50", "#CC79A7", "^:")
    twin, twins = report["lone"]["twin"], report["saturation"]["twins"]
    axes.axhline(
        twin["p50_ms"],
        color=_GREEN,
        linestyle="--",
        linewidth=1,
        label=f"twin alone, p50: {twin['p50_ms']:.1f} ms",
    )
    label = f"{twins['processes']} twins at once: {twins['users_per_s']:.0f} users/s (batch {twins['batch_size']:.1f})"
    axes.axvline(twins["users_per_s"], color=_GREEN, linestyle="-.", linewidth=1, label=label)
    axes.set(
        xlabel="answered requests per second (one user each)", ylabel="latency, ms (log scale)", yscale="log"
    )
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2)
    release, computer = report["release"], report["machine"]
    subject = f"{release['shop']}, {release['items']:,} items, {release['candidates']} candidates"
    axes.set_title(f"{subject}\n{computer['cpu']}, {computer['cores']} cores, {report['date'][:10]}", size=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--plot {path}: cannot be written: {error}") from None
    finally:
        plt.close(figure)


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, style: str
) -> None:
    points = [(row["achieved_per_s"], row[key]) for row in rows if row.get(key)]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)

"""Shows what `peregrine bench` measured: as tables, and as a JSON file. plot.py draws it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.errors import InvalidInput
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BUSY = 0.5  # load average per core from which a machine's times are not worth publishing
_Cells = tuple[str, str, str]  # of a row
_LATENCIES = ("p50_ms", "p95_ms", "p99_ms", "p999_ms")


def write_json(figures: Mapping[str, Any], path: Path) -> None:
    """Writes everything that was measured as JSON; InvalidInput if the file cannot be written."""
    try:
        path.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--json {path}: cannot be written: {error.strerror}") from None


def print_tables(figures: Mapping[str, Any], console: Console) -> None:
    """Prints everything that was measured, as tables."""
    m, r = figures["machine"], figures["release"]
    console.print(
        f"[bold]{r['shop']}[/] release {r['name']}: {r['users']:,} users, {r['items']:,} items, "
        f"{r['candidates']} candidates"
    )
    console.print(
        f"{m['cpu']}, {m['cores']} cores, load {m['load_average_1min']:.1f} before; tritonserver "
        f"{r['tritonserver']}; {figures['date']}"
    )
    if m["load_average_1min"] > m["cores"] * _BUSY:
        console.print(
            "[yellow]Other work kept this machine busy: times are too long and ratios of times unsure; CPU "
            "milliseconds hold.[/]"
        )
    for table in (_versus_table(figures), _load_table(figures), _steps_table(figures)):
        console.print(table)
    console.print(_figures_table(figures))
    if figures["perf_analyzer"] is None and figures["options"].get("use_perf_analyzer", True):
        console.print("perf_analyzer: not found; `peregrine bench --install-perf-analyzer` gets it")


def _table(title: str, *columns: str) -> Table:
    """Makes a table of figures: names on the left, numbers flush right; narrow terminals fold them."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _versus_table(figures: Mapping[str, Any]) -> Table:
    """Compares one request at a time with the twin."""
    columns = ("p50 ms", "p99 ms", "CPU ms", "twin p50", "twin p99", "twin CPU", "p50 ratio")
    table = _table("One request at a time: Triton and its local twin", "users a request", *columns)
    pairs = [("1 (lone)", figures["lone"]["triton"], figures["lone"]["twin"])]
    pairs += [(str(row["batch_size"]), row["triton"], row["twin"]) for row in figures["batches"]]
    for name, ours, twin in pairs:
        mine = [ours["p50_ms"], ours["p99_ms"], ours.get("cpu_ms")]
        theirs = [twin["p50_ms"], twin["p99_ms"], twin["cpu_ms_per_user"] * twin["batch_size"]]
        table.add_row(name, *map(_number, [*mine, *theirs, ours["p50_ms"] / twin["p50_ms"]]))
    return table


def _load_table(figures: Mapping[str, Any]) -> Table:
    """Shows closed loops, open loops and perf_analyzer's."""
    title = "Under load (* the generator could not send in time: the machine's other work was measured too)"
    left = ("load", "offered/s", "achieved/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms")
    table = _table(title, *left, "failed", "batch", "CPU ms", "of twins")
    twins = figures["saturation"]["twins"]["users_per_s"]
    for kind in ("closed", "open", "perf_analyzer"):
        for row in figures[kind] or ():
            name = f"{kind} {row['concurrency']}" if "concurrency" in row else kind
            name += "" if row.get("kept_up", True) else " *"
            cells = [row.get("offered_per_s"), row["achieved_per_s"], *(row.get(key) for key in _LATENCIES)]
            rest = [row.get("mean_batch"), row.get("cpu_ms"), row["achieved_per_s"] / twins]
            table.add_row(name, *map(_number, cells), str(row.get("failed", "")), *map(_number, rest))
        table.add_section()
    return table


def _steps_table(figures: Mapping[str, Any]) -> Table:
    """Shows where a request's time goes, lone and at saturation, from Triton's statistics."""
    phases = ("queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
    title = "Milliseconds per request and step, by Triton's statistics"
    table = _table(title, "step", "batch", "queue", "input", "infer", "output", "twin's run")
    best = max(figures["closed"], key=lambda row: row["achieved_per_s"])
    for name, row, twin in (
        ("lone", figures["lone"]["triton"], figures["lone"]["twin"]["steps_ms"]),
        ("saturated", best, {}),
    ):
        for step in figures["release"]["steps"]:
            cells = [row["steps"].get(step, {}).get(key) for key in ("mean_batch", *phases)]
            table.add_row(f"{name} {step}", *map(_number, [*cells, twin.get(step)]))
        table.add_section()
    return table


def _figures_table(figures: Mapping[str, Any]) -> Table:
    """Shows the figures that stand for the rest."""
    table = _table("Figures", "figure", "value", "of which")
    for row in (*_lone_rows(figures), *_saturation_rows(figures["saturation"]), *_half_rows(figures["half"])):
        table.add_row(*row)
    return table


def _lone_rows(figures: Mapping[str, Any]) -> list[_Cells]:
    """Says what a lone request costs more than the twin's."""
    lone, steps = figures["lone"], len(figures["release"]["steps"])
    times = f"{lone['triton']['p50_ms']:.2f} − {lone['twin']['p50_ms']:.2f}"
    return [
        ("lone request, p50 minus twin's", f"{lone['added_ms']:.2f} ms", times),
        ("a hop: that, by step", f"{lone['hop_ms']:.2f} ms", f"{steps} steps"),
    ]


def _saturation_rows(saturation: Mapping[str, Any]) -> list[_Cells]:
    """Compares throughput and CPU at saturation with the twins'."""
    twins, per_s = saturation["twins"], f"{saturation['achieved_per_s']:.0f}/s"
    rates = (
        f"{per_s} with {saturation['concurrency']} in flight; "
        f"{twins['processes']} twins {twins['users_per_s']:.0f}/s"
    )
    rows = [("throughput at saturation, of the twins'", f"{saturation['throughput_ratio']:.2f}", rates)]
    if "added_cpu_ms" in saturation:
        times = f"{saturation['cpu_ms']:.2f} − {twins['cpu_ms_per_user']:.2f}"
        batch, added = f"mean batch {saturation['mean_batch']:.1f}", f"{saturation['added_cpu_ms']:.2f} ms"
        rows.append(("CPU per request minus twin's at the same batch", added, f"{times}, {batch}"))
    return rows


def _half_rows(half: Mapping[str, Any] | None) -> list[_Cells]:
    """Compares p99 at half of saturation with a lone request's p50 and with queued twins."""
    if half is None:
        return []
    ours = f"{half['p99_ms']:.1f} ms at {half['rate']:.0f}/s"
    twins = f"{half['twins_p99_ms']:.1f} ms, no server"
    return [
        ("p99 at half of saturation, of lone p50", f"{half['ratio']:.1f}", ours),
        ("the same, of the p99 of twins behind one queue", f"{half['twins_ratio']:.1f}", twins),
    ]


def _number(value: float | None) -> str:
    """Writes a number: whole from 100 on, else with two decimals."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"

"""The bench: what it computes from measurements, how it is shown, and a whole run against a real server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clients.bench import measurement as bench
from clients.bench import perf_analyzer
from clients.bench import report as bench_report
from clients.bench.machine import machine
from clients.bench.plot import write_plot
from clients.bench.server_probe import Snapshot, mean_batch, steps_between
from clients.cli import bench as bench_cli
from ensemble.errors import InvalidInput, ServerError

LATENCIES = {"p50_ms": 2.0, "p95_ms": 3.0, "p99_ms": 4.0, "p999_ms": 5.0, "mean_ms": 2.1}
STEP = {
    "mean_batch": 2.0,
    "failed": 0,
    "queue_ms": 0.1,
    "compute_input_ms": 0.1,
    "compute_infer_ms": 1.0,
    "compute_output_ms": 0.1,
}


def twin_row(batch_size: float = 1, processes: int = 1) -> dict[str, Any]:
    row = {**LATENCIES, "p50_ms": 1.0, "batch_size": batch_size, "processes": processes}
    return {
        **row,
        "users_per_s": 800.0 * processes * batch_size,
        "cpu_ms_per_user": 1.0 / batch_size,
        "steps_ms": {"recall": 0.5},
    }


def load_row(**changes: Any) -> dict[str, Any]:
    row = {
        **LATENCIES,
        "achieved_per_s": 400.0,
        "sent": 800,
        "failed": 0,
        "failures": {},
        "steps": {"recall": STEP},
        "mean_batch": 2.0,
        "cpu_ms": 1.5,
    }
    return {**row, "batch_size": 1, "users_per_s": 400.0, **changes}


@pytest.fixture
def report() -> dict[str, Any]:
    closed = [
        load_row(concurrency=1, achieved_per_s=200.0),
        load_row(concurrency=4),
        load_row(concurrency=8, achieved_per_s=390.0),
    ]
    opened = [
        load_row(
            rate=rate,
            share=rate / 400,
            offered_per_s=rate,
            achieved_per_s=rate,
            kept_up=rate < 300,
            lag_p99_ms=0.5,
            twins={**LATENCIES, "p99_ms": 2.5},
        )
        for rate in (100.0, 200.0, 360.0)
    ]
    lone = {
        "triton": load_row(concurrency=1),
        "twin": twin_row(),
        "added_ms": 1.0,
        "ratio": 2.0,
        "hop_ms": 1.0,
    }
    return {
        **machine(),
        "release": {
            "name": "r1",
            "shop": "toy",
            "users": 10,
            "items": 20,
            "candidates": 8,
            "steps": ["recall"],
            "tritonserver": "2.51.0",
        },
        "options": {},
        "lone": lone,
        "batches": [{"batch_size": 8, "triton": load_row(concurrency=1, batch_size=8), "twin": twin_row(8)}],
        "closed": closed,
        "open": opened,
        "saturation": bench._saturation(closed[1], twin_row(2, 2)),
        "half": bench._half(opened, lone),
        "perf_analyzer": [{**LATENCIES, "concurrency": 1, "achieved_per_s": 210.0, "failed": 0}],
    }


def test_saturation_and_half_are_ratios_to_the_twin_and_to_a_lone_request(report: dict[str, Any]) -> None:
    assert report["saturation"]["throughput_ratio"] == pytest.approx(400 / 3200)
    assert report["saturation"]["added_cpu_ms"] == pytest.approx(1.5 - 0.5)
    assert report["half"] == {
        "rate": 200.0,
        "share": 0.5,
        "p99_ms": 4.0,
        "twins_p99_ms": 2.5,
        "ratio": 2.0,
        "twins_ratio": 1.6,
    }
    assert bench._half([], report["lone"]) is None


def test_report_is_printed_written_and_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(record=True, width=200)
    bench_report.print_tables(report, console)
    text = console.export_text()
    assert "throughput at saturation, of the twins'" in text
    assert "open *" in text
    bench_report.write_json(report, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["cores"] >= 1
    write_plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    with pytest.raises(InvalidInput, match=r"^--json .*: cannot be written: "):
        bench_report.write_json(report, tmp_path / "absent" / "bench.json")


def test_steps_between_counts_only_what_happened_in_between() -> None:
    counters = {
        "users": 10,
        "executions": 5,
        "requests": 8,
        "failed": 1,
        **dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 0),
    }
    later = {
        **counters,
        "users": 30,
        "executions": 9,
        "requests": 18,
        "queue": 5_000_000,
        "compute_infer": 20_000_000,
    }
    before, after = (
        Snapshot(0, 1.0, {"r1_recall": counters}),
        Snapshot(1, 2.0, {"r1_recall": later, "r1_recommend": later}),
    )
    steps = steps_between(before, after, "r1", ["features", "recall"])
    assert list(steps) == ["recall"]
    assert steps["recall"]["mean_batch"] == 5.0
    assert (steps["recall"]["queue_ms"], steps["recall"]["compute_infer_ms"], steps["recall"]["failed"]) == (
        0.5,
        2.0,
        0,
    )


def test_mean_batch_is_harmonic() -> None:
    assert mean_batch({"a": {"mean_batch": 1.0}, "b": {"mean_batch": 3.0}}) == pytest.approx(1.5)
    assert mean_batch({}) == 1.0


def test_twins_between_two_batch_sizes_are_mixed_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = bench.Bench.__new__(bench.Bench)
    subject.say = lambda text: None
    monkeypatch.setattr(bench.Bench, "twin", lambda self, size, processes=1: twin_row(size, processes))
    mixed = subject.twins_at(1.5)
    assert mixed["cpu_ms_per_user"] == pytest.approx(1 / 1.5)
    assert mixed["users_per_s"] == pytest.approx(800 * 1.5 * mixed["processes"])
    assert subject.twins_at(2.0)["cpu_ms_per_user"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 0}, "--seconds: must be above 0, got 0"),
        ({"rates": [0]}, "--rates: numbers above 0, separated by commas, got [0]"),
        ({"concurrency": []}, "--concurrency: numbers above 0, separated by commas, got []"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        replace(bench.BenchOptions(Path("x")), **change)
    assert str(caught.value) == message


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^--rates: numbers separated by commas, got 'a,b'$"):
        bench_cli.bench(repository=tmp_path, rates="a,b", parameters="{}")
    with pytest.raises(InvalidInput, match=r"^--parameters: a JSON object"):
        bench_cli.bench(repository=tmp_path, rates=None, concurrency="1", batch_sizes="1", parameters="[1]")
    with pytest.raises(
        ServerError, match=r"^no server is at work on .*; start one: peregrine serve --repository "
    ):
        bench.measure(bench.BenchOptions(tmp_path), print)


def test_auto_is_still_taken_though_it_says_what_happens_anyway(tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench_cli.bench)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path)])

    assert "--auto" not in CliRunner().invoke(app, ["--help"]).output
    assert "no server is at work on" in str(invoke("--auto").exception)
    assert str(invoke("--auto", "--rates", "5").exception).startswith("--auto and --rates exclude each other")


@pytest.mark.parametrize("width", [50, 80])
def test_tables_are_never_cut(report: dict[str, Any], width: int) -> None:
    from rich.console import Console

    console = Console(record=True, width=width)
    bench_report.print_tables(report, console)
    assert "…" not in console.export_text()


def test_a_figure_that_is_no_number_is_null(report: dict[str, Any], tmp_path: Path) -> None:
    report["lone"]["ratio"], report["half"]["ratio"] = float("nan"), float("inf")
    bench_report.write_json(report, tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    assert (written["lone"]["ratio"], written["half"]["ratio"]) == (None, None)
    assert written["lone"]["hop_ms"] == 1.0


CSV = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,\
p50 latency,p90 latency,p95 latency,p99 latency,Avg latency
4,1742.5,0,1,2,3531,9000,12661,17965,4000
"""


def test_perf_analyzer_csv_is_read_in_milliseconds() -> None:
    row = perf_analyzer.row_from_csv(CSV)
    assert row == {
        "concurrency": 4,
        "achieved_per_s": 1742.5,
        "p50_ms": 3.531,
        "p95_ms": 12.661,
        "p99_ms": 17.965,
        "mean_ms": 4.0,
    }
    with pytest.raises(InvalidInput, match=r"^perf_analyzer's CSV has no row"):
        perf_analyzer.row_from_csv(CSV.splitlines()[0])


def test_perf_analyzer_gets_headers_and_typed_parameters(tmp_path: Path) -> None:
    parameters = {"top_k": 5, "exclude_seen": False, "diversity": 0.5, "weights": "{}"}
    line = " ".join(
        perf_analyzer.arguments(
            perf_analyzer.Sweep("h:1", {"triton-grpc-protocol-x": "y"}, ["u"], 4, 3.0, 2, parameters),
            tmp_path,
        )
    )
    assert "-m recommend -u h:1 -i grpc" in line
    assert "-b 2 --concurrency-range 4 -p 1000" in line
    assert "-H triton-grpc-protocol-x:y" in line
    assert line.endswith(
        "--request-parameter top_k:5:int --request-parameter exclude_seen:false:bool"
        " --request-parameter diversity:0.5:double --request-parameter weights:{}:string"
    )


def test_perf_analyzer_that_does_not_start_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "perf_analyzer"
    binary.write_text("#!/bin/sh\necho 'error while loading shared libraries: libb64.so.0d' >&2\nexit 127\n")
    binary.chmod(0o755)
    monkeypatch.setenv(perf_analyzer.VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert perf_analyzer.why_not(perf_analyzer.PerfAnalyzer(binary, None)) is not None
    assert perf_analyzer.find() is None


@pytest.mark.triton
@pytest.mark.timeout(180)
def test_a_whole_run_against_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy release answers zeros, so its twin is written out here."""
    from toy_repository import allow_toys, publish_toy

    from ensemble.server.options import ServeOptions
    from ensemble.server.supervisor import serve

    allow_toys(monkeypatch)
    publish_toy(tmp_path / "repository", "r1", tmp_path, item_ids=(b"item",), activate=True)
    monkeypatch.setattr(bench.Bench, "twin", lambda self, size, processes=1: twin_row(size, processes))
    monkeypatch.setattr(bench.Bench, "queued_twins", lambda self, rate: {**LATENCIES, "rate": rate})
    monkeypatch.setattr(bench, "MAX_CONCURRENCY", 4)
    options = bench.BenchOptions(
        tmp_path / "repository", seconds=0.5, rates=[20, 40], concurrency=(1, 2), batch_sizes=(2,)
    )
    said: list[str] = []
    with serve(tmp_path / "repository", ServeOptions(port=0, metrics_port=None)):
        report = bench.measure(options, said.append)
    json.dumps(report, allow_nan=False)
    assert report["release"]["tritonserver"].startswith("2.")
    steps = ["features", "user_encoder", "recall", "ranker", "reranking"]
    for row in (report["lone"]["triton"], report["batches"][0]["triton"], *report["closed"], *report["open"]):
        assert (row["failed"], row["failures"]) == (0, {})
        assert list(row["steps"]) == steps
        assert row["achieved_per_s"] > 5
        assert row["cpu_ms"] >= 0  # the kernel counts in steps of 10 ms a process
    assert sum(row["cpu_ms"] for row in report["closed"]) > 0.1
    own = "the server's own canary, one user a second, is counted too, and may share a batch"
    assert 1.0 <= report["lone"]["triton"]["steps"]["recall"]["mean_batch"] < 1.2, own
    assert 1.8 < report["batches"][0]["triton"]["steps"]["recall"]["mean_batch"] < 2.2, own
    if perf_analyzer.find():
        assert all(
            row["achieved_per_s"] > 5 and row["failed"] == 0 and list(row["steps"]) == steps
            for row in report["perf_analyzer"]
        )

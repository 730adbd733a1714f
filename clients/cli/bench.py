"""Runs `peregrine bench`: latency, throughput and cost of the served release, beside its local twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY
from ensemble.errors import InvalidInput

_WIDTH = 130  # of what is written into a file or a pipe

Repository = Annotated[Path, typer.Option("--repository", "-r", help="The repository that is being served.")]
Url = Annotated[str | None, typer.Option(help="Must be the server of that repository, if given.")]
Seconds = Annotated[float, typer.Option(help="Of each measurement; there are about twenty.")]
Rates = Annotated[
    str | None,
    typer.Option(
        help="Open-loop rates, requests a second: 50,100,200. Default: .25, .5, .75 and .9 of the measured "
        "saturation."
    ),
]
Auto = Annotated[bool, typer.Option("--auto", hidden=True)]  # was an option; now says what happens anyway
Concurrency = Annotated[
    str, typer.Option(help="Closed-loop requests in flight; doubled further until throughput stops growing.")
]
BatchSizes = Annotated[str, typer.Option(help="Users in a request, one request at a time.")]
Zipf = Annotated[float, typer.Option(help="Exponent of how unequally often users come; 0 = all alike.")]
Parameters = Annotated[str, typer.Option(help='Request parameters of every request, as JSON: {"top_k": 50}.')]
Seed = Annotated[int, typer.Option(help="Of users and arrival times.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write the latency-throughput plot.")]
UsePerfAnalyzer = Annotated[
    bool, typer.Option("--perf-analyzer/--no-perf-analyzer", help="Run it too, where it is found.")
]
InstallPerfAnalyzer = Annotated[
    bool,
    typer.Option("--install-perf-analyzer", help="Fetch perf_analyzer with pip into the cache, and stop."),
]


def bench(
    repository: Repository = REPOSITORY,
    url: Url = None,
    seconds: Seconds = 5.0,
    rates: Rates = None,
    auto: Auto = False,
    concurrency: Concurrency = "1,4,16",
    batch_sizes: BatchSizes = "1,8,64",
    zipf: Zipf = 1.1,
    parameters: Parameters = "{}",
    seed: Seed = 0,
    json_file: JsonFile = None,
    plot: Plot = None,
    use_perf_analyzer: UsePerfAnalyzer = True,
    install_perf_analyzer: InstallPerfAnalyzer = False,
) -> None:
    """Measures the server at work on the repository: closed loop, open loop, per step, and against its local
    twin."""
    if install_perf_analyzer:
        from clients.bench.perf_analyzer import install

        typer.echo(f"perf_analyzer is at {install().binary}")
        return
    if auto and rates:
        raise InvalidInput("--auto and --rates exclude each other; give one")
    from clients.bench.measurement import BenchOptions

    options = BenchOptions(
        repository=repository,
        url=url,
        seconds=seconds,
        rates=_numbers("--rates", rates, float) if rates else None,
        concurrency=_numbers("--concurrency", concurrency, int),
        batch_sizes=_numbers("--batch-sizes", batch_sizes, int),
        zipf=zipf,
        seed=seed,
        parameters=_parameters(parameters),
        use_perf_analyzer=use_perf_analyzer,
    )
    _measure_and_report(options, json_file, plot)


def _measure_and_report(options: Any, json_file: Path | None, plot: Path | None) -> None:
    """Measures, writes the files that were asked for, and prints the tables."""
    from rich.console import Console

    from clients.bench import report
    from clients.bench.measurement import measure
    from clients.bench.plot import write_plot

    with Console(stderr=True).status("connecting") as status:
        figures = measure(options, status.update)
    if json_file:
        report.write_json(figures, json_file)
    if plot:
        write_plot(figures, plot)
    wide = Console()
    report.print_tables(figures, wide if wide.is_terminal else Console(width=_WIDTH))


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    """Reads numbers separated by commas; `kind` is int or float."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"{option}: numbers separated by commas, got {text!r}") from None


def _parameters(text: str) -> dict[str, Any]:
    """Reads request parameters from a JSON object, as the client sends them: scalars as they are, all else as
    JSON."""
    try:
        values = json.loads(text)
        return {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in values.items()
        }
    except (ValueError, AttributeError):
        raise InvalidInput(f'--parameters: a JSON object such as {{"top_k": 50}}, got {text!r}') from None

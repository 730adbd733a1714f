"""`peregrine bench`: latency, throughput and cost of the served release, beside the same pipeline without a
server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble.errors import InvalidInput

_WIDTH = 130  # of what is written into a file or a pipe


def bench(
    repository: Annotated[
        Path, typer.Option("--repository", "-r", help="The repository that is being served.")
    ] = Path("model_repository"),
    url: Annotated[str | None, typer.Option(help="Must be the server of that repository, if given.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each measurement; there are about twenty.")] = 5.0,
    rates: Annotated[
        str | None, typer.Option(help="Open-loop rates, requests a second: 50,100,200. Default: --auto.")
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Open-loop rates are .25, .5, .75 and .9 of the measured saturation."),
    ] = False,
    concurrency: Annotated[
        str,
        typer.Option(help="Closed-loop requests in flight; doubled further until throughput stops growing."),
    ] = "1,4,16",
    batch_sizes: Annotated[str, typer.Option(help="Users in a request, one request at a time.")] = "1,8,64",
    zipf: Annotated[
        float, typer.Option(help="Exponent of how unequally often users come; 0 = all alike.")
    ] = 1.1,
    parameters: Annotated[
        str, typer.Option(help='Request parameters of every request, as JSON: {"top_k": 50}.')
    ] = "{}",
    seed: Annotated[int, typer.Option(help="Of users and arrival times.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write the latency-throughput plot.")
    ] = None,
    use_perf_analyzer: Annotated[
        bool, typer.Option("--perf-analyzer/--no-perf-analyzer", help="Run it too, where it is found.")
    ] = True,
    install_perf_analyzer: Annotated[
        bool,
        typer.Option(
            "--install-perf-analyzer", help="Fetch perf_analyzer with pip into the cache, and stop."
        ),
    ] = False,
) -> None:
    """Measures the server at work on the repository: closed loop, open loop, per step, and against its local
    twin."""
    from rich.console import Console

    if install_perf_analyzer:
        from clients.bench.perf_analyzer import install

        typer.echo(f"perf_analyzer is at {install().binary}")
        return
    if auto and rates:
        raise InvalidInput("--auto and --rates exclude each other; give one")
    from clients.bench import report as bench_report
    from clients.bench import run as measurement

    options = measurement.BenchOptions(
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
    progress = Console(stderr=True)
    with progress.status("connecting") as status:
        report = measurement.run(options, status.update)
    if json_file:
        bench_report.write_json(report, json_file)
    if plot:
        bench_report.write_plot(report, plot)
    wide = Console()
    bench_report.print_report(report, wide if wide.is_terminal else Console(width=_WIDTH))


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInput(f"{option}: numbers separated by commas, got {text!r}") from None


def _parameters(text: str) -> dict[str, Any]:
    """Request parameters: scalars as they are, all else as JSON, as the client sends them."""
    try:
        values = json.loads(text)
        return {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in values.items()
        }
    except (ValueError, AttributeError):
        raise InvalidInput(f'--parameters: a JSON object such as {{"top_k": 50}}, got {text!r}') from None

"""`peregrine serve`: the active release of a repository behind gRPC, until a signal ends it."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY, RepositoryOption
from ensemble.errors import InvalidInput


class _Signal(BaseException):
    """SIGTERM or SIGINT, raised in the main thread so that `with serve(…)` ends as it should."""

    def __init__(self, number: int) -> None:
        self.number = number


def serve(
    repository: RepositoryOption = REPOSITORY,
    port: Annotated[int, typer.Option(help="gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0 is off.")] = 8002,
    address: Annotated[
        str, typer.Option(help="Where to listen; beyond loopback only with tritonserver 2.72 or newer.")
    ] = "127.0.0.1",
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="All steps of a request in one process: fewest hops, for machines without a GPU (README, "
            "Serve).",
        ),
    ] = False,
    require: Annotated[
        str | None,
        typer.Option(
            help="What engines must run on: tensorrt, onnxruntime-gpu or onnxruntime; the best that is "
            "there if not given."
        ),
    ] = None,
    index: Annotated[
        str,
        typer.Option(
            help="Where the main index is searched: cpu, or gpu: with faiss-gpu, and an index of whole "
            "vectors."
        ),
    ] = "cpu",
    redis: Annotated[
        str | None,
        typer.Option(
            "--redis",
            help="Feature rows from Redis, too: redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.",
            envvar="PEREGRINE_REDIS",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Triton's own log.")] = False,
    start_timeout_s: Annotated[float, typer.Option(help="How long the models may take to load.")] = 300.0,
) -> None:
    """Serves the active release with Triton over gRPC; SIGTERM or Ctrl-C answers what is in flight and
    stops."""
    from ensemble.live.service import service_process
    from ensemble.server import supervisor as server
    from ensemble.tiers.settings import url_from_option

    if port < 0 or metrics_port < 0:
        raise InvalidInput(f"ports are 0 to 65535, got --port {port} --metrics-port {metrics_port}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_once)
    started = time.monotonic()
    try:
        options: dict[str, Any] = {
            "log": _log,
            "verbose": int(verbose),
            "start_timeout_s": start_timeout_s,
            "fused": fused,
            "require": require,
            "index": index,
            "redis": url_from_option(redis) if redis else None,
        }
        with (
            server.serve(repository, port, metrics_port or None, address, **options) as running,
            service_process(repository.resolve(), _log),
        ):
            print(_greeting(running, time.monotonic() - started), flush=True)
            running.wait()
    except _Signal as stop:
        _log("stopped")
        sys.exit(0 if stop.number == signal.SIGTERM else 130)


def _raise_once(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGINT):
        # the drain is bounded; a second signal must not cut it short and leave processes
        signal.signal(other, signal.SIG_IGN)
    raise _Signal(number)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _greeting(running: Any, start_s: float) -> str:
    """Endpoints, what is served by how many processes in how much memory, and a call to paste."""
    from ensemble.release.release import active_release
    from ensemble.tiers.settings import hidden

    repository = running.launch.repository
    stubs = running.stubs()
    resident, proportional = running.memory_bytes()
    user = _some_user(repository, active_release(repository))
    shown = "" if repository == REPOSITORY.resolve() else f" --repository {repository}"
    return "\n".join(
        (
            f"serving release {active_release(repository)} of {repository} (ready after {start_s:.1f} s)",
            f"  gRPC       {running.url}  (model `recommend`)",
            f"  metrics    {running.metrics_url or 'off'}",
            f"  instances  {sum(map(len, stubs.values()))} Python processes: "
            + ", ".join(f"{len(pids)} {name}" for name, pids in stubs.items()),
            "             (two a step: Triton never restarts one that dies; one thread each: instances are "
            "the parallelism)",
            f"  memory     {proportional / 1e6:.0f} MB, shared pages counted once ({resident / 1e6:.0f} MB "
            "resident, summed)",
            *(
                [f"  features   {hidden(running.launch.redis)}, then the release's own rows"]
                if running.launch.redis
                else []
            ),
            *(
                [
                    "  faster     with --fused: the same answers from one process a request; these engines "
                    "run on the CPU"
                ]
                if _could_be_fused(running)
                else []
            ),
            f"  try        peregrine recommend {user}{shown}",
            "Ctrl-C or SIGTERM stops it.",
        )
    )


def _could_be_fused(running: Any) -> bool:
    """Without a GPU, what five steps cost buys nothing."""
    from ensemble.engines import ONNXRUNTIME

    runtime = running.launch.runtime
    return runtime.engine == ONNXRUNTIME and not runtime.plans and running.launch.configuration is None


def _some_user(repository: Path, release: str | None) -> str:
    import shlex

    from ensemble.release.ids import open_ids

    try:
        ids = open_ids(repository / str(release) / "user_ids.npy").sorted_ids
        return shlex.quote(ids[len(ids) // 2].decode())
    except (OSError, ValueError, IndexError):
        return "USER"

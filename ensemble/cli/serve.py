"""Runs `peregrine serve`: serves the active release of a repository over gRPC until a signal ends it."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption, RepositoryOption
from ensemble.progress import log_of, say

if TYPE_CHECKING:
    from ensemble.server.options import ServeOptions
    from ensemble.server.supervisor import Server


Port = Annotated[int, typer.Option(help="gRPC; 0 takes a free one.")]
MetricsPort = Annotated[int, typer.Option(help="Prometheus metrics; 0 is off.")]
HttpPort = Annotated[
    int,
    typer.Option(
        help="HTTP with /livez, /readyz (a list came within a second) and /metrics (Triton's and our own); 0 "
        "is off.",
    ),
]
Address = Annotated[
    str, typer.Option(help="Where to listen; beyond loopback only with tritonserver 2.72 or newer.")
]
Fused = Annotated[
    bool,
    typer.Option(
        "--fused",
        help="All steps of a request in one process: fewest hops, for machines without a GPU (README, "
        "Serve).",
    ),
]
Require = Annotated[
    str | None,
    typer.Option(
        help="What engines must run on: tensorrt, rtx, onnxruntime-gpu or onnxruntime; the best that is "
        "there if not given."
    ),
]
Index = Annotated[
    str,
    typer.Option(
        help="Where the main index is searched: cpu, or gpu: with faiss-gpu, and an index of whole vectors."
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="N,N…",
        help="Which GPUs to use, as nvidia-smi numbers them; the instances of each step take them by turns. "
        "The first alone if not given.",
    ),
]
Shards = Annotated[
    int,
    typer.Option(
        help="Parts that an index of whole vectors is cut into, for one that no card holds: on the GPUs by "
        "turns, searched at once, the same lists."
    ),
]
Instances = Annotated[
    int | None,
    typer.Option(
        help="Processes of each step (with --fused: of the whole pipeline); as the release says, two, if not "
        "given. One for every core or two is what --fused wants on a larger machine."
    ),
]
Redis = Annotated[
    str | None,
    typer.Option(
        "--redis",
        help="Feature rows from Redis, too: redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.",
        envvar="PEREGRINE_REDIS",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        help="The folder for what the server runs from: its own view of the repository. By default one of "
        "this user's for each repository (~/.local/state/peregrine); a second server needs another.",
    ),
]
RouteRelease = Annotated[
    str | None,
    typer.Option(
        "--route",
        help="The release to serve where no route is written and none can be: on a read-only --catalogue.",
    ),
]
AsRoot = Annotated[
    bool,
    typer.Option(
        "--as-root",
        help="Serve as root, on single-tenant hosts only: who can list its processes can read the secret of "
        "Triton's control calls, and run code as the server's user.",
        envvar="PEREGRINE_AS_ROOT",
    ),
]
Traces = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Send spans of traced requests to this collector (OTLP over HTTP), such as "
        "http://127.0.0.1:4318/v1/traces: those whose callers trace, by the header traceparent.",
        envvar="PEREGRINE_TRACES",
    ),
]
TraceShare = Annotated[
    float, typer.Option(help="Share of the other requests that are traced, too; 0.01 is one in a hundred.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Triton's own log.")]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", help="Write each line of the log as JSON.", envvar="PEREGRINE_LOG_JSON"),
]
StartTimeout = Annotated[float, typer.Option(help="How long the models may take to load.")]


class _Signal(BaseException):
    """Carries SIGTERM or SIGINT into the main thread, so that `with serve(…)` ends as it should."""

    def __init__(self, number: int) -> None:
        self.number = number


def serve(
    repository: RepositoryOption = REPOSITORY,
    port: Port = 8001,
    metrics_port: MetricsPort = 8002,
    http_port: HttpPort = 0,
    address: Address = "127.0.0.1",
    fused: Fused = False,
    require: Require = None,
    index: Index = "cpu",
    gpus: Gpus = None,
    shards: Shards = 1,
    instances: Instances = None,
    redis: Redis = None,
    state: State = None,
    catalogue: CatalogueOption = None,
    route: RouteRelease = None,
    as_root: AsRoot = False,
    traces: Traces = None,
    trace_share: TraceShare = 0.0,
    verbose: Verbose = False,
    log_json: LogJson = False,
    start_timeout_s: StartTimeout = 300.0,
) -> None:
    """Serves the active release with Triton over gRPC; SIGTERM or Ctrl-C answers what is in flight and
    stops."""
    from ensemble.engines.cards import cards_from_text
    from ensemble.release.names import check_name
    from ensemble.server.checks import check_user
    from ensemble.server.options import ServeOptions
    from ensemble.tiers.settings import url_from_option

    check_user(as_root)
    options = ServeOptions(
        port,
        metrics_port or None,
        http_port=http_port or None,
        address=address,
        fused=fused,
        require=require,
        index=index,
        shards=shards,
        gpus=cards_from_text(gpus) if gpus else None,
        instances=instances,
        redis=url_from_option(redis) if redis else None,
        state=state.resolve() if state else None,
        catalogue=catalogue.resolve() if catalogue else None,
        route=check_name(route) if route else None,
        traces=traces,
        trace_share=trace_share,
        verbose=verbose,
        start_timeout_s=start_timeout_s,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_once)
    try:
        _serve_until_signal(repository, options, log_json=log_json)
    except _Signal as stop:
        say("stopped")
        sys.exit(0 if stop.number == signal.SIGTERM else 130)


def _serve_until_signal(repository: Path, options: ServeOptions, *, log_json: bool) -> None:
    """Serves and prints the greeting; returns only if the server ends by itself."""
    from ensemble.live.keeper import service_process
    from ensemble.server import supervisor

    def writer() -> AbstractContextManager[None]:
        """Writes items beside the server: what it makes, instances read when they start."""
        return service_process(repository.resolve(), log, options.catalogue)

    started, log = time.monotonic(), log_of(log_json)
    with supervisor.serve(repository, options, log, beside=writer) as server:
        print(_greeting(server, time.monotonic() - started), flush=True)
        server.wait()


def _raise_once(number: int, frame: FrameType | None) -> None:
    """Raises _Signal for the first signal and ignores later ones: the drain is bounded, and one that is cut
    short would leave processes."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise _Signal(number)


def _greeting(server: Server, start_s: float) -> str:
    """Tells the endpoints, what is served by how many processes in how much memory, and a call to paste."""
    from ensemble.tiers.settings import hidden

    repository, redis = server.launch.repository, server.launch.options.redis
    release, stubs = server.release, server.stubs()
    resident, proportional = server.memory_bytes()
    shown = "" if repository == REPOSITORY.resolve() else f" --repository {repository}"
    lines = [
        f"serving release {release} of {repository} (ready after {start_s:.1f} s)",
        f"  gRPC       {server.url}  (model `recommend`)",
        f"  metrics    {server.metrics_url or 'off'}",
        f"  engines    {server.launch.runtime.title}",
        f"  instances  {sum(map(len, stubs.values()))} Python processes: "
        + ", ".join(f"{len(pids)} {name}" for name, pids in stubs.items()),
        "             (two a step or more: one answers while another is replaced; one thread each: they are "
        "the parallelism)",
        f"  memory     {proportional / 1e6:.0f} MB, shared pages counted once ({resident / 1e6:.0f} MB "
        "resident, summed)",
    ]
    if server.http_url:
        lines.insert(3, f"  probes     {server.http_url}/livez, /readyz, /metrics")
    if redis:
        lines.append(f"  features   {hidden(redis)}, then the release's own rows")
    if _could_be_fused(server):
        lines.append(
            "  faster     with --fused: the same answers from one process a request; these engines run on "
            "the CPU"
        )
    lines.append(f"  try        peregrine recommend {_some_user(repository, release)}{shown}")
    return "\n".join([*lines, "Ctrl-C or SIGTERM stops it."])


def _could_be_fused(server: Server) -> bool:
    """Says whether --fused would be faster: without a GPU, what five steps cost buys nothing."""
    from ensemble.engines import ONNXRUNTIME

    return server.launch.runtime.engine == ONNXRUNTIME and server.launch.configuration is None


def _some_user(repository: Path, release: str | None) -> str:
    """Gives the id of a user of the release, quoted for a shell; "USER" where it cannot be read."""
    import shlex

    from ensemble.release.ids import open_ids

    try:
        ids = open_ids(repository / str(release) / "user_ids.npy").sorted_ids
        return shlex.quote(ids[len(ids) // 2].decode())
    except (OSError, ValueError, IndexError):
        return "USER"

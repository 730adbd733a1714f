"""Holds what a server is asked to be in one object, which is checked when it is built and then travels."""

from __future__ import annotations

import ipaddress
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.engines import CPU, ENGINES, GPU
from ensemble.errors import InvalidInput
from ensemble.tiers.settings import TierSettings

MOST_INSTANCES = 128  # each is a process of every step
MOST_SHARDS = 64


@dataclass(frozen=True)
class ServeOptions:
    """Holds all that `peregrine serve` can be told; InvalidInput names the first value that cannot be."""

    port: int = 8001  # of gRPC; 0 takes a free one
    metrics_port: int | None = 8002  # of Prometheus' metrics; 0 takes a free one, None serves none
    http_port: int | None = None  # of /livez, /readyz and /metrics; 0 takes a free one, None serves none
    address: str = "127.0.0.1"
    fused: bool = False  # all steps of a request in one Python process, instead of the ensemble
    require: str | None = None  # one of ENGINES, or an error; None takes the best that is there
    index: str = CPU  # engines.CPU or GPU: where the main index is searched
    shards: int = 1  # parts of the main index, on as many GPUs by turns
    gpus: tuple[int, ...] | None = None  # which ones, as CUDA numbers them; None: whatever it shows
    instances: int | None = None  # processes of each step; None: as the release says
    redis: str | None = field(default=None, repr=False)  # URL of feature rows; it may hold a password
    state: Path | None = None  # where it keeps what it runs from; None: a folder of this user's
    catalogue: Path | None = None  # where route and catalogue log lie; None: in the repository
    route: str | None = None  # the release to serve where there is no route
    verbose: bool = False  # Triton's own log is shown
    traces: str | None = None  # URL of a collector of OTLP over HTTP; None: nothing is traced
    trace_share: float = 0.0  # of the requests that bring no trace of their caller's
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name, port in (
            ("--port", self.port),
            ("--metrics-port", self.metrics_port),
            ("--http-port", self.http_port),
        ):
            if port is not None and not 0 <= port <= 65535:
                raise InvalidInput(f"{name} {port}: ports are 0 to 65535")
        if self.address != "localhost":
            _check_is_address(self.address)
        check_requirement(self.require)
        if self.index not in (CPU, GPU):
            raise InvalidInput(f"--index {self.index}: is unknown; use {CPU} or {GPU}")
        if not 1 <= self.shards <= MOST_SHARDS:
            raise InvalidInput(f"--shards {self.shards}: can be 1 to {MOST_SHARDS}")
        if self.instances is not None and not 1 <= self.instances <= MOST_INSTANCES:
            raise InvalidInput(f"--instances {self.instances}: can be 1 to {MOST_INSTANCES}")
        if self.redis is not None:
            TierSettings(self.redis)  # refused here rather than in every step
        if self.traces is not None:
            _check_is_collector(self.traces)
        if not 0 <= self.trace_share <= 1:
            raise InvalidInput(f"--trace-share {self.trace_share:g}: is a share, 0 to 1")
        if self.trace_share and self.traces is None:
            raise InvalidInput(f"--trace-share {self.trace_share:g}: where to? give --traces URL, too")
        if not self.start_timeout_s > 0:
            raise InvalidInput(f"--start-timeout-s must be above 0, got {self.start_timeout_s}")

    @property
    def num_gpus(self) -> int:
        """Counts the GPUs that engines are on, where there are any."""
        return len(self.gpus) if self.gpus else 1

    @property
    def is_loopback(self) -> bool:
        """Says whether only this machine can reach the server."""
        return self.address == "localhost" or ipaddress.ip_address(self.address).is_loopback


def check_requirement(require: str | None) -> None:
    """Raises InvalidInput unless `require` names something that engines run on, or nothing."""
    if require is not None and require not in ENGINES:
        raise InvalidInput(f"--require {require}: known are {', '.join(ENGINES)}")


def _check_is_collector(url: str) -> None:
    """Raises InvalidInput unless spans can be sent to `url`, which stands in a command line."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "," in url:
        raise InvalidInput(f"--traces {url}: is no URL of a collector, such as http://host:4318/v1/traces")
    if parts.username or parts.password:
        raise InvalidInput(
            "--traces: its URL holds a password, and other users can read command lines",
            "send to a collector on this host, which holds the credentials",
        )


def _check_is_address(address: str) -> None:
    """Raises InvalidInput unless `address` is an IP address."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise InvalidInput(
            f"address {address!r} is not an IP address; use 127.0.0.1, or 0.0.0.0 for every interface"
        ) from None

"""Reads what a server did between two moments: CPU seconds, and Triton's statistics of each step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble.errors import ServerError

_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Snapshot:
    """Holds counters at one moment."""

    at_s: float
    cpu_s: float | None  # tritonserver and its Python processes; None when they are not on this machine
    models: dict[str, dict[str, int]]  # by model: users, executions, requests, and ns per phase


class ServerProbe:
    """Reads the counters of a server on this machine; `headers` open its statistics."""

    def __init__(self, url: str, headers: Mapping[str, str], pid: int | None) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._pb, self._rpc_error, self._metadata = service_pb2, grpc.RpcError, tuple(headers.items())
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url))
        self._url, self._pid = url, pid

    def version(self) -> str:
        """Asks for the server's version; ServerError if there is no server."""
        try:
            return str(self._stub.ServerMetadata(self._pb.ServerMetadataRequest()).version)
        except self._rpc_error as error:
            raise ServerError(
                f"no server at {self._url} ({error.code().name})", "start one: peregrine serve"
            ) from None

    def snapshot(self) -> Snapshot:
        """Reads all counters now; without Triton's where the server keeps them to its operator."""
        try:
            response = self._stub.ModelStatistics(self._pb.ModelStatisticsRequest(), metadata=self._metadata)
        except self._rpc_error as error:
            if "restricted" in (error.details() or ""):
                return Snapshot(time.perf_counter(), self.cpu_s(), {})
            raise ServerError(
                f"server {self._url} did not give its statistics ({error.code().name})"
            ) from None
        return Snapshot(
            time.perf_counter(),
            self.cpu_s(),
            {model.name: _counters(model) for model in response.model_stats},
        )

    def cpu_s(self) -> float | None:
        """Gives the CPU seconds so far of tritonserver and all processes below it; the kernel counts each in
        steps of 10 ms."""
        processes = self._processes()
        return None if processes is None else sum(sum(process.cpu_times()[:2]) for process in processes)

    def memory_bytes(self) -> int | None:
        """Gives the resident bytes of those processes; pages they share count in each."""
        processes = self._processes()
        return None if processes is None else sum(process.memory_info().rss for process in processes)

    def _processes(self) -> list[Any] | None:
        """Finds tritonserver and all processes below it; None where they are not on this machine."""
        if self._pid is None:
            return None
        import psutil

        top = psutil.Process(self._pid)
        family = (top, *top.children(recursive=True))
        servers = [process for process in family if process.name() == "tritonserver"]
        return [one for server in servers for one in (server, *server.children(recursive=True))] or None


def _counters(model: Any) -> dict[str, int]:
    """Reads the counters of one model from Triton's statistics."""
    stats = model.inference_stats
    phases = {phase: getattr(stats, phase).ns for phase in _PHASES}
    return {
        "users": model.inference_count,
        "executions": model.execution_count,
        "requests": stats.success.count,
        "failed": stats.fail.count,
        **phases,
    }


def steps_between(
    before: Snapshot, after: Snapshot, release: str, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Gives for each step of the release, in the order of `names`, its mean batch, and the milliseconds that
    a request spent in each phase."""
    steps = {}
    for name in names:
        now = after.models.get(f"{release}_{name}", {})
        then = before.models.get(f"{release}_{name}", {})
        delta = {key: value - then.get(key, 0) for key, value in now.items()}
        if delta.get("executions", 0) > 0:
            phases = {f"{phase}_ms": delta[phase] / 1e6 / max(1, delta["requests"]) for phase in _PHASES}
            steps[name] = {
                "mean_batch": delta["users"] / delta["executions"],
                "failed": delta["failed"],
                **phases,
            }
    return steps


def mean_batch(steps: Mapping[str, Mapping[str, float]]) -> float:
    """Gives the harmonic mean of the steps' batch sizes: at it, work per user equals that of these steps, if
    an execution costs a + b * users."""
    return len(steps) / sum(1 / step["mean_batch"] for step in steps.values()) if steps else 1.0

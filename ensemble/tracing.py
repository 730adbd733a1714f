"""Makes a span of each step that runs inside a process of the server, below Triton's span of the request.

Where steps are models of their own Triton's spans are the steps' (`--trace-config`, server/process.py); with
`--fused` they are made here. Both go to the same collector, and neither has a user or an item in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ensemble.errors import ServerError

TRACES_VARIABLE = "PEREGRINE_TRACES"  # the collector's URL; not set where nothing is traced
_SERVICE = "peregrine"


class Ran(NamedTuple):
    """Says when a step ran, in nanoseconds since 1970."""

    step: str
    started: int
    ended: int


def check_tracing() -> None:
    """Raises ServerError with the cure where the packages that steps trace with are missing."""
    try:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: F401
        from opentelemetry.sdk import trace  # noqa: F401
    except ModuleNotFoundError as error:
        raise ServerError(
            f"--traces with --fused needs {error.name}, which is not installed",
            "pip install 'peregrine-recommender[traces]'",
        ) from None


class StepSpans:
    """Sends spans of steps, from a thread of its own; a collector that is away costs nothing but them."""

    def __init__(self, url: str, release: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # A parent is there only for what Triton traces; so all are kept
        self._provider = TracerProvider(resource=Resource({"service.name": _SERVICE}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url, timeout=2)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        self._tracer = self._provider.get_tracer(_SERVICE)
        self._release = release

    def send(self, requests: Sequence[Any], ran: Sequence[Ran]) -> None:
        """Gives each request of a batch that is traced the spans of the steps that answered it."""
        for request in requests:
            parent = _parent(request)
            for one in ran if parent is not None else ():
                span = self._tracer.start_span(
                    one.step,
                    context=parent,
                    start_time=one.started,
                    attributes={"peregrine.release": self._release, "peregrine.batch": len(requests)},
                )
                span.end(one.ended)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def spans_of(release: str) -> StepSpans | None:
    """Gives what sends spans, where this server traces."""
    url = os.environ.get(TRACES_VARIABLE)
    return StepSpans(url, release) if url else None


def _parent(request: Any) -> Any:
    """Reads the context of Triton's span of a request; None where it is not traced."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    text = request.trace().get_context()
    carrier = json.loads(text) if text else {}
    return TraceContextTextMapPropagator().extract(carrier) if "traceparent" in carrier else None

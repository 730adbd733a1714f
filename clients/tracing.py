"""Lets a request's spans on the server join the trace of the application that asks, where it has one.

Nothing is imported: an application that traces has imported OpenTelemetry's API itself. Where no span is
recorded nothing is sent: a server that is told `--traces` keeps spans of every request that brings a trace.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clients.results import Recommendations
from clients.wire import Call
from ensemble.contract import PIPELINE


class CallSpan:
    """Is the client's span of one call; without a trace it does nothing.

    The call gets the request's id that servers log: its caller's, else the trace's, else one by chance.
    """

    def __init__(self, call: Call) -> None:
        self._span: Any = None
        api: Any = sys.modules.get("opentelemetry.trace")
        if api is None or not _is_sampled(api.get_current_span()):
            self.call = replace(call, request_id=call.request_id or f"{random.getrandbits(64):016x}")
            return
        name = call.model or PIPELINE
        self._span = api.get_tracer("peregrine").start_span(name, kind=api.SpanKind.CLIENT)
        context = self._span.get_span_context()
        trace = f"{context.trace_id:032x}"
        self.call = replace(
            call,
            traceparent=f"00-{trace}-{context.span_id:016x}-01",
            request_id=call.request_id or trace,
        )

    def end(self, results: Sequence[Recommendations], error: BaseException | None) -> None:
        """Ends it with what the call came to: counts and the release, never a user or an item."""
        if self._span is None:
            return
        self._span.set_attribute("peregrine.users", len(self.call.user_ids))
        if results:
            self._span.set_attribute("peregrine.release", results[0].release)
            flags = 0
            for one in results:
                flags |= int(one.degraded)
            self._span.set_attribute("peregrine.degraded", flags)
        if error is not None:
            self._span.set_attribute("error.type", type(error).__name__)
        self._span.end()


def _is_sampled(span: Any) -> bool:
    """Says whether a span is kept, so that the server's are worth keeping."""
    context = span.get_span_context()
    return bool(context.is_valid and context.trace_flags.sampled)

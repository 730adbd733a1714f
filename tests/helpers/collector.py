"""A collector of traces: what is sent to it by OTLP over HTTP, as JSON (Triton) or protobuf (Python)."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple


class Span(NamedTuple):
    trace: str
    id: str
    parent: str
    name: str
    release: str


class Collector:
    """Keeps spans, and all bytes that came."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/traces"
        self.spans: list[Span] = []
        self.raw = b""

    def take(self, kind: str, body: bytes) -> None:
        self.raw += body
        document = json.loads(body) if "json" in kind else _from_protobuf(body)
        for one in document["resourceSpans"]:
            for scope in one["scopeSpans"]:
                self.spans += [_span(span) for span in scope["spans"]]


def _from_protobuf(body: bytes) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest.FromString(body)
    document = MessageToDict(request)
    for one, resource in zip(document["resourceSpans"], request.resource_spans, strict=True):
        for scope, spans in zip(one["scopeSpans"], resource.scope_spans, strict=True):
            for span, ids in zip(
                scope["spans"], spans.spans, strict=True
            ):  # JSON of OTLP has hexadecimal ids
                span["traceId"], span["spanId"] = ids.trace_id.hex(), ids.span_id.hex()
                span["parentSpanId"] = ids.parent_span_id.hex()
    return document


def _span(span: dict[str, Any]) -> Span:
    attributes = {one["key"]: str(next(iter(one["value"].values()))) for one in span.get("attributes", ())}
    release = attributes.get("peregrine.release", attributes.get("triton.model_name", ""))
    return Span(span["traceId"], span["spanId"], span.get("parentSpanId", ""), span["name"], release)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Listens on loopback while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take(self.headers["Content-Type"], body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

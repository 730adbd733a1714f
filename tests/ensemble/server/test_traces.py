"""Traces: from the application by way of the client to each step, one trace, to a collector on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from collector import Collector, Span, collecting
from shops import private_copy

from clients import Client
from ensemble.errors import InvalidInput
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed (extra traces)")
STEPS = ("features", "user_encoder", "recall", "ranker", "reranking")
SECRET = "someone-whom-nobody-names"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as one:
        yield one


@pytest.fixture(scope="module", params=[False, True], ids=["ensemble", "fused"])
def server(
    request: pytest.FixtureRequest,
    collector: Collector,
    tiny_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    repository = private_copy(tiny_repository, tmp_path_factory.mktemp("traced") / "repository")
    options = ServeOptions(
        0, None, fused=request.param, state=tmp_path_factory.mktemp("state"), traces=collector.url
    )
    with serve(repository, options) as server:
        yield server


def traced(ask: Callable[[], object], collector: Collector) -> tuple[str, set[str]]:
    """Asks within a trace of an application: its id, and the ids of its own spans and the client's."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with provider.get_tracer("application").start_as_current_span("page") as page:
        ask()
    spans = {one.name: one for one in kept.get_finished_spans()}
    assert spans["recommend"].parent.span_id == page.get_span_context().span_id
    assert spans["recommend"].attributes["peregrine.release"] == "r1"
    assert SECRET not in "".join(one.to_json() for one in spans.values())
    return f"{page.get_span_context().trace_id:032x}", {
        f"{one.context.span_id:016x}" for one in spans.values()
    }


def wait_for(collector: Collector, trace: str, least: int) -> list[Span]:
    deadline = time.monotonic() + 20
    while len(mine := [span for span in collector.spans if span.trace == trace]) < least:
        assert time.monotonic() < deadline, mine
        time.sleep(0.1)
    return mine


@pytest.mark.triton
def test_one_trace_goes_from_the_application_to_each_step(server: Server, collector: Collector) -> None:
    with Client(server.url) as client:
        trace, theirs = traced(lambda: client.recommend(SECRET), collector)
    is_fused = server.launch.options.fused
    mine = wait_for(collector, trace, 9 if is_fused else 13)
    steps = STEPS if is_fused else tuple(f"r1_{step}" for step in STEPS)
    assert {span.name for span in mine} == {"InferRequest", "recommend", "r1_recommend", "compute", *steps}
    known = theirs | {span.id for span in mine}
    assert {span.parent for span in mine} <= known
    assert all(span.release.startswith("r1") for span in mine if span.name in steps)
    assert SECRET.encode() not in collector.raw


@pytest.mark.triton
def test_whoever_does_not_trace_leaves_no_span(server: Server, collector: Collector) -> None:
    time.sleep(1.5)  # until all of the test before has come
    before = len(collector.spans)
    with Client(server.url) as client:
        for _ in range(20):
            client.recommend("u1")
    time.sleep(1.5)
    assert len(collector.spans) == before


@pytest.mark.parametrize(
    ("traces", "share", "words"),
    [
        ("collector:4318", 0.0, "is no URL of a collector"),
        ("http://me:secret@collector/v1/traces", 0.0, "holds a password"),
        ("http://collector/v1/traces", 2.0, "is a share, 0 to 1"),
        (None, 0.1, "give --traces URL"),
    ],
)
def test_a_wrong_option_is_named(traces: str | None, share: float, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        ServeOptions(traces=traces, trace_share=share)
    assert "secret" not in str(caught.value)

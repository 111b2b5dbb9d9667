"""What spans say, and what they never say; the processes that make them are in tests/acceptance/test_trace.py."""

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from img2img import tracing
from img2img.errors import ConfigurationError, QueueFull
from img2img.jobs import JobSpec
from img2img.queue_types import Submitted
from img2img.requests import JobOptions, Parameters

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
JOB = "0-019ab000-0000-7000-8000-000000000000"
FOREIGN = {"traceparent": f"{CALLER}-00"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What ends meanwhile; a provider of its own, because a process has one only."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampling.ParentBased(sampling.ALWAYS_ON))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def spec_of(carrier: dict[str, str]) -> JobSpec:
    parameters = Parameters(prompt="a secret")
    return JobSpec(
        id=JOB, account="a", parameters=parameters, options=JobOptions(), seed=1, fingerprint="", trace=carrier
    )


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def test_a_failed_span_has_the_code_and_not_the_words(spans: InMemorySpanExporter) -> None:
    """What an error says may quote a prompt; libraries' errors are told by their class."""
    for error, kind in ((QueueFull("a secret", 1.0), "queue_full"), (ValueError("a secret"), "ValueError")):
        spans.clear()
        with pytest.raises(type(error)), tracing.send_span("default", JOB):
            raise error
        span = only(spans)
        assert (span.attributes or {})["error.type"] == span.status.description == kind
        assert span.status.status_code is StatusCode.ERROR
        assert not span.events
        assert "secret" not in span.to_json()


def test_a_job_that_joins_another_says_which(spans: InMemorySpanExporter) -> None:
    with tracing.send_span("default", JOB) as sending:
        sending.accepted(Submitted("0-other", created=False))
    assert (only(spans).attributes or {})["img2img.joined.job.id"] == "0-other"


def test_a_trace_that_is_not_kept_has_no_later_attempts(spans: InMemorySpanExporter) -> None:
    """Neither they nor the jobs of a batch begin a trace that is kept, as those of a kept one do."""
    for attempt in (1, 2):
        with tracing.process_span("default", spec_of(FOREIGN), attempt, "fake/fake"):
            pass
    parent = trace.set_span_in_context(trace.get_current_span(tracing.propagator.extract(FOREIGN)))
    with (
        tracing.tracer.start_as_current_span("call", parent),
        tracing.send_span("default", JOB, apart=True) as sent,
    ):
        assert sent.carrier["traceparent"].startswith(CALLER[:36])
    assert not spans.get_finished_spans()


def test_what_cannot_be_a_jobs_id_is_not_told(spans: InMemorySpanExporter) -> None:
    """Callers may send anything in its place."""
    with tracing.tracer.start_as_current_span("call"):
        tracing.name_job("a secret")
    with tracing.tracer.start_as_current_span("call"):
        tracing.name_job(JOB)
    told = [(span.attributes or {}).get("img2img.job.id") for span in spans.get_finished_spans()]
    assert told == [None, JOB]


def test_a_call_upstream_tells_the_upstream_of_itself(spans: InMemorySpanExporter) -> None:
    """An error status fails the span; the answer's own id is kept, so that the upstream can be asked about it."""
    with tracing.call_span("https://api.example.com/client/v4/run") as (span, headers):
        tracing.answered(span, 429, "ray-1")
    made = only(spans)
    context = made.get_span_context()
    assert context is not None
    assert headers["traceparent"].split("-")[1:3] == [
        trace.format_trace_id(context.trace_id),
        trace.format_span_id(context.span_id),
    ]
    assert made.attributes == {
        "http.request.method": "POST",
        "url.full": "https://api.example.com/client/v4/run",
        "server.address": "api.example.com",
        "server.port": 443,
        "http.response.status_code": 429,
        "img2img.upstream.request_id": "ray-1",
        "error.type": "429",
    }


def test_another_protocol_than_grpc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans would get lost without a word."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_PROTOCOL must be grpc"), tracing.tracing("x"):
        pass

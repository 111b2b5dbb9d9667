"""The spans of a job, from its caller to each stage and each call upstream (docs/telemetry.md).

They follow OpenTelemetry's semantic conventions for messaging: ``send <queue>`` where a job is accepted,
``process <queue>`` where an attempt runs it, stages as its children. Prompts and pictures never get into spans.
"""

import importlib.metadata
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

import structlog
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from img2img.errors import ConfigurationError, Img2ImgError
from img2img.jobs import JOB_ID, JobSpec, Stage
from img2img.queue_types import Submitted

OTLP_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
LAST_SPANS_SECONDS: Final = 3.0
"""How long the end of a process waits for its last spans to be taken."""
HTTP_ERRORS: Final = 400

tracer = trace.get_tracer("img2img")
propagator: Final = TraceContextTextMapPropagator()
"""Trace context and nothing else: what else callers send, such as ``baggage``, would be kept in every job."""


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Export spans over OTLP while the process runs, where an endpoint is set (OTEL_* variables apply).

    Raises:
        ConfigurationError: the variables ask for another protocol than gRPC.
    """
    propagate.set_global_textmap(propagator)
    if _variable(*OTLP_VARIABLES) is None or _variable("OTEL_TRACES_EXPORTER") == "none":
        yield
        return
    if (protocol := _variable(*PROTOCOL_VARIABLES)) not in (None, "grpc"):
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, not {protocol!r}: name a gRPC endpoint")
    version = importlib.metadata.version("img2img")
    ours = Resource.create({"service.name": service, "service.version": version})
    # Last, because what the environment says of this process is the operator's word.
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # The SDK tries for half a minute, longer than whoever asked this process to end may wait.
        giving_up = threading.Timer(LAST_SPANS_SECONDS, exporter.shutdown)
        giving_up.daemon = True
        giving_up.start()
        provider.shutdown()
        giving_up.cancel()


def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set, and not empty."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def flush(seconds: float) -> None:
    """Export the spans that have ended, for as long as that may take: before a process ends without further ado."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(int(seconds * 1000))


def name_job(job_id: str) -> None:
    """Have the current span, and what the current task logs from now on, say which job they are about.

    Callers may send anything as an id: what cannot be one is not told.
    """
    if JOB_ID.fullmatch(job_id):
        structlog.contextvars.bind_contextvars(job=job_id)
        trace.get_current_span().set_attribute("img2img.job.id", job_id)


def trace_response() -> str | None:
    """What a caller is told of the current span, in the form of the header ``traceresponse``; None without a trace."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    ids = f"{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}"
    return f"00-{ids}-{context.trace_flags:02x}"


def fail(span: Span, kind: str) -> None:
    """Mark a span as failed. It never says more than a stable code or a class: an error's words may quote a prompt."""
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, kind)


class Sending:
    """The producer's span while a job is being accepted; ``carrier`` is what the job's record takes to its worker."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.carrier: dict[str, str] = {}
        propagator.inject(self.carrier)

    def accepted(self, submitted: Submitted) -> None:
        """Tell which pool took the job, or which earlier one it joined."""
        if submitted.created:
            self._span.update_name(f"send {submitted.pool}")
            self._span.set_attribute("messaging.destination.name", submitted.pool)
        else:
            self._span.set_attribute("img2img.joined.job.id", submitted.id)


@contextmanager
def send_span(queue: str, job_id: str, *, apart: bool = False) -> Iterator[Sending]:
    """The producer's span; ``apart`` begins a trace of its own, linked to the call's, as each job of a batch has.

    Where the call's trace is not kept, the job belongs to it all the same, and is not kept either.
    """
    call = trace.get_current_span()
    apart = apart and call.is_recording()
    with (
        structlog.contextvars.bound_contextvars(job=job_id),
        _failing_span(
            f"send {queue}",
            SpanKind.PRODUCER,
            _messaging(queue, job_id, "send"),
            context=Context() if apart else None,
            links=[Link(call.get_span_context())] if apart else [],
        ) as span,
    ):
        yield Sending(span)


@contextmanager
def process_span(queue: str, spec: JobSpec, attempt: int, engine: str) -> Iterator[Span]:
    """An attempt's span: the first is a child of the producer and linked to it, later ones only linked.

    Where the producer's trace is not kept, no attempt's is. What is logged meanwhile names the job and the attempt.
    """
    parent = propagator.extract(spec.trace)
    origin = trace.get_current_span(parent).get_span_context()
    attributes: dict[str, str | int] = {
        **_messaging(queue, spec.id, "process"),
        "img2img.attempt": attempt,
        "img2img.engine": engine,
        "img2img.steps": spec.parameters.steps,
    }
    with (
        structlog.contextvars.bound_contextvars(job=spec.id, attempt=attempt),
        _failing_span(
            f"process {queue}",
            SpanKind.CONSUMER,
            attributes,
            context=Context() if attempt > 1 and origin.trace_flags.sampled else parent,
            links=[Link(origin)] if origin.is_valid else [],
        ) as span,
    ):
        yield span


def stage_span(stage: Stage, began: int, ended: int, attributes: Mapping[str, float] | None) -> None:
    """The span of a stage that is over, child of the current attempt's; times in nanoseconds since 1970."""
    tracer.start_span(f"stage {stage.value}", start_time=began, attributes=attributes).end(ended)


@contextmanager
def call_span(url: str) -> Iterator[tuple[Span, dict[str, str]]]:
    """The span of one ``POST`` to another service, and the headers that tell that service of it."""
    parts = urlsplit(url)
    attributes: dict[str, str | int] = {
        "http.request.method": "POST",
        "url.full": url,
        "server.address": parts.hostname or "",
        "server.port": parts.port or (443 if parts.scheme == "https" else 80),
    }
    with _failing_span("POST", SpanKind.CLIENT, attributes) as span:
        headers: dict[str, str] = {}
        propagator.inject(headers)
        yield span, headers


def answered(span: Span, status: int, request_id: str) -> None:
    """What came back to a ``call_span``: the HTTP status, and the service's own name for the call, if it gave one."""
    span.set_attribute("http.response.status_code", status)
    if request_id:
        span.set_attribute("img2img.upstream.request_id", request_id)
    if status >= HTTP_ERRORS:
        fail(span, str(status))


@contextmanager
def _failing_span(
    name: str,
    kind: SpanKind,
    attributes: Mapping[str, str | int],
    *,
    context: Context | None = None,
    links: Sequence[Link] = (),
) -> Iterator[Span]:
    """A current span that fails by the code, or the class, of the error that ends it."""
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        links=links,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as exc:
            fail(span, exc.code if isinstance(exc, Img2ImgError) else type(exc).__name__)
            raise


def _messaging(queue: str, job_id: str, operation: str) -> dict[str, str]:
    return {
        "messaging.system": "arq",
        "messaging.destination.name": queue,
        "messaging.message.id": job_id,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }

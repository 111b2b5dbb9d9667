"""Every metric, span and log format of the service, declared in one place.

Spans follow OpenTelemetry's semantic conventions for messaging: ``send <queue>`` where a job is accepted,
``process <queue>`` where an attempt runs it, stages as its children. Prompts and pictures never get into spans
or logs; ``IMG2IMG_LOG_PROMPTS`` puts the prompts into the gateway's log.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram

from img2img.jobs import JobSpec, Stage

OTLP_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

JOBS_SUBMITTED = Counter("img2img_jobs_submitted", "Jobs accepted", ["front_end"])
JOBS_REJECTED = Counter("img2img_jobs_rejected", "Requests refused before they became jobs", ["reason"])
JOBS_COMPLETED = Counter("img2img_jobs_completed", "Jobs ended by this worker", ["outcome", "engine"])
STAGE_SECONDS = Histogram("img2img_job_stage_seconds", "Time per stage of a job", ["stage"], buckets=SECONDS)
ENGINE_BUSY_SECONDS = Counter("img2img_engine_busy_seconds", "Time in passes through the network", ["device"])
ENGINE_PASSES = Counter("img2img_engine_passes", "Passes through the network", ["device"])
ENGINE_ROWS = Counter("img2img_engine_rows", "Rows of those passes, without padding", ["device"])
ENGINE_MEMORY_BYTES = Gauge("img2img_engine_memory_bytes", "Memory taken on the device", ["device"])
UPSTREAM_CALLS = Counter("img2img_upstream_calls", "Calls of the service that makes the pictures", ["outcome"])
MODEL_LOAD_SECONDS = Histogram("img2img_model_load_seconds", "Time to open the engine", buckets=SECONDS)

tracer = trace.get_tracer("img2img")
propagator: Final = TraceContextTextMapPropagator()
"""Trace context and nothing else: what else callers send, such as ``baggage``, would be kept in every job."""


@contextmanager
def tracing(service: str) -> Iterator[None]:
    """Export spans over OTLP while the process runs, where an endpoint is set (OTEL_* variables apply)."""
    propagate.set_global_textmap(propagator)
    if not any(os.environ.get(variable) for variable in OTLP_VARIABLES):
        yield
        return
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def flush(seconds: float) -> None:
    """Export the spans that have ended, for as long as that may take: before a process ends without further ado."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(int(seconds * 1000))


def configure_logging(level: str, form: str) -> None:
    """Log to standard error: ``json`` lines, ``console`` for people, or ``auto`` by what stderr is."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    renderer: structlog.typing.Processor = (
        # Plain tracebacks: the pretty ones print local variables, prompts among them.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    final: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if not console:
        final.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[*final, renderer], foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in ("arq", "faker", "httpx", "httpcore", "PIL", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _add_trace(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event


@contextmanager
def send_span(queue: str, job_id: str) -> Iterator[dict[str, str]]:
    """The producer's span; yields the carrier that the job's record takes to its worker."""
    attributes = _messaging(queue, job_id, "send")
    with tracer.start_as_current_span(f"send {queue}", kind=SpanKind.PRODUCER, attributes=attributes):
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        yield carrier


@contextmanager
def process_span(queue: str, spec: JobSpec, attempt: int) -> Iterator[Span]:
    """An attempt's span: the first is a child of the producer and linked to it, later ones only linked."""
    parent = propagator.extract(spec.trace)
    origin = trace.get_current_span(parent).get_span_context()
    links = [Link(origin)] if origin.is_valid else []
    attributes: dict[str, str | int] = {**_messaging(queue, spec.id, "process"), "img2img.attempt": attempt}
    with tracer.start_as_current_span(
        f"process {queue}",
        context=parent if attempt == 1 else Context(),
        kind=SpanKind.CONSUMER,
        links=links,
        attributes=attributes,
    ) as span:
        yield span


def start_stage(stage: Stage) -> Span:
    """A stage's span, child of the current attempt; the caller ends it."""
    return tracer.start_span(f"stage {stage.value}")


def _messaging(queue: str, job_id: str, operation: str) -> dict[str, str]:
    return {
        "messaging.system": "arq",
        "messaging.destination.name": queue,
        "messaging.message.id": job_id,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }

"""Every metric and the log format of the service, declared in one place; spans are in ``tracing.py``.

A process shows one registry, ``GATEWAY`` or ``WORKER``; none of their labels names a job or an account.
Prompts and pictures never get into logs; ``IMG2IMG_LOG_PROMPTS`` puts the prompts into the gateway's log.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from img2img.errors import Img2ImgError

GATEWAY: Final = CollectorRegistry()
"""What a gateway's ``/metrics`` shows."""
WORKER: Final = CollectorRegistry()
"""What a worker's shows."""

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LONG: Final = (*SECONDS, 600, 1800, 3600)
"""Buckets of what may wait in a queue."""
LAG: Final = (0.001, 0.0025, *SECONDS[:11])
ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
OPENMETRICS: Final = "application/openmetrics-text"
PLAIN: Final = "text/plain; version=0.0.4; charset=utf-8"
LAG_PAUSE: Final = 0.25
"""Seconds between two looks at how late the event loop is."""

# A second series for each counter and histogram, which nobody looks at.
disable_created_metrics()  # type: ignore[no-untyped-call]

JOBS_SUBMITTED = Counter("img2img_jobs_submitted", "Jobs accepted", ["front_end"], registry=GATEWAY)
JOBS_REJECTED = Counter(
    "img2img_jobs_rejected", "Requests refused before they became jobs, by error code", ["reason"], registry=GATEWAY
)
HTTP_SECONDS = Histogram(
    "img2img_http_request_seconds", "Time to the end of the answer; without one the status is none",
    ["route", "method", "status"], unit="seconds", buckets=SECONDS, registry=GATEWAY,
)  # fmt: skip
RPC_SECONDS = Histogram(
    "img2img_rpc_request_seconds", "Time to the end of a call",
    ["method", "code"], unit="seconds", buckets=SECONDS, registry=GATEWAY,
)  # fmt: skip

# These are read from the queue's server at each scrape, so that they are there when no worker is.
QUEUE_UP = Gauge(
    "img2img_queue_up", "1 if the queue server answered this scrape, else 0, without the other gauges of queues",
    registry=GATEWAY,
)  # fmt: skip
QUEUE_JOBS = Gauge(
    "img2img_queue_jobs", "Jobs: queued ones that may start, delayed, running, quarantined",
    ["queue", "state"], registry=GATEWAY,
)  # fmt: skip
QUEUE_OLDEST_SECONDS = Gauge(
    "img2img_queue_oldest_job_age_seconds", "How long the job has been waiting that has been able to start for longest",
    ["queue"], unit="seconds", registry=GATEWAY,
)  # fmt: skip
QUEUE_BACKLOG_SECONDS = Gauge(
    "img2img_queue_backlog_seconds", "Estimated work of the jobs that may start, and what is left of those that run",
    ["queue"], unit="seconds", registry=GATEWAY,
)  # fmt: skip
QUEUE_DEMAND_SECONDS = Gauge(
    "img2img_queue_demand_seconds", "Work that the pool owes, as autoscalers are told",
    ["queue"], unit="seconds", registry=GATEWAY,
)  # fmt: skip
QUEUE_SPEND = Gauge(
    "img2img_queue_spend", "What calls of a pool with a price come to on this day (UTC), reserved ones included",
    ["queue"], registry=GATEWAY,
)  # fmt: skip
QUEUE_SPEND_CAP = Gauge(
    "img2img_queue_spend_cap", "What they may come to, where the pool has a spend_per_day", ["queue"], registry=GATEWAY
)
WORKERS = Gauge("img2img_workers", "Workers alive", ["queue"], registry=GATEWAY)
OF_QUEUES: Final = (
    QUEUE_JOBS, QUEUE_OLDEST_SECONDS, QUEUE_BACKLOG_SECONDS, QUEUE_DEMAND_SECONDS, QUEUE_SPEND, QUEUE_SPEND_CAP, WORKERS
)  # fmt: skip

JOBS_COMPLETED = Counter("img2img_jobs_completed", "Jobs ended by this worker", ["outcome", "engine"], registry=WORKER)
JOB_SECONDS = Histogram(
    "img2img_job_seconds", "Time from a job's submission to its end by this worker",
    ["outcome"], unit="seconds", buckets=LONG, registry=WORKER,
)  # fmt: skip
STAGE_SECONDS = Histogram(
    "img2img_job_stage_seconds", "Time per stage of a job", ["stage"], unit="seconds", buckets=LONG, registry=WORKER
)
WORKER_SLOTS = Gauge("img2img_worker_slots", "How many jobs the worker runs at once now", registry=WORKER)
WORKER_BUSY = Gauge("img2img_worker_busy", "How many jobs it runs", registry=WORKER)
CLAIMS_LOST = Counter("img2img_worker_claims_lost", "Attempts whose job went to another worker", registry=WORKER)
MODEL_LOAD_SECONDS = Histogram(
    "img2img_model_load_seconds", "Time to open the engine", unit="seconds", buckets=LONG, registry=WORKER
)
ENGINE_BUSY_SECONDS = Counter(
    "img2img_engine_busy_seconds", "Time in passes through the network", ["device"], unit="seconds", registry=WORKER
)
ENGINE_PASSES = Counter("img2img_engine_passes", "Passes through the network", ["device"], registry=WORKER)
ENGINE_ROWS = Counter("img2img_engine_rows", "Rows of those passes, without padding", ["device"], registry=WORKER)
BATCH_ROWS = Histogram(
    "img2img_batch_rows", "Rows of a pass, without padding", ["device"], buckets=ROWS, registry=WORKER
)
ENGINE_MEMORY_BYTES = Gauge(
    "img2img_engine_memory_bytes", "Memory taken of a GPU, 0 on a CPU", ["device"], unit="bytes", registry=WORKER
)
UPSTREAM_CALLS = Counter("img2img_upstream_calls", "Calls of the upstream", ["outcome"], registry=WORKER)
UPSTREAM_SECONDS = Histogram(
    "img2img_upstream_request_seconds", "Time of such a call until its answer was read",
    ["outcome"], unit="seconds", buckets=SECONDS, registry=WORKER,
)  # fmt: skip

LAG_SECONDS = Histogram(
    "img2img_event_loop_lag_seconds", "How much later than asked for the event loop came round",
    unit="seconds", buckets=LAG, registry=None,
)  # fmt: skip
for _registry in (GATEWAY, WORKER):
    for _collector in (LAG_SECONDS, PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        _registry.register(_collector)


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The registry's metrics now, and their media type, in the form that suits an ``Accept`` header.

    OpenMetrics, which has exemplars, for who asks for it, as Prometheus does; else Prometheus' text.
    """
    if OPENMETRICS not in accept:
        return generate_latest(registry), PLAIN
    text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
    return text, openmetrics.CONTENT_TYPE_LATEST


def observe(histogram: Histogram, seconds: float, context: Context | None = None) -> None:
    """Count ``seconds``; the trace of ``context``, by default the current one, is its exemplar if it is sampled."""
    of_span = trace.get_current_span(context).get_span_context()
    is_sampled = of_span.is_valid and of_span.trace_flags.sampled
    histogram.observe(seconds, {"trace_id": trace.format_trace_id(of_span.trace_id)} if is_sampled else None)


@contextmanager
def counting_rejections() -> Iterator[None]:
    """Count the error, if any, with which the block refuses a request."""
    try:
        yield
    except Img2ImgError as exc:
        JOBS_REJECTED.labels(exc.code).inc()
        raise


async def measure_lag() -> None:
    """Observe for ever how late the running event loop is."""
    while True:
        asked = time.perf_counter() + LAG_PAUSE
        await asyncio.sleep(LAG_PAUSE)
        LAG_SECONDS.observe(max(0.0, time.perf_counter() - asked))


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
        event["span_id"] = trace.format_span_id(context.span_id)
    return event

"""What is measured of the REST front end, and the gauges of the queues, which a scrape reads."""

import asyncio
import re
import time
from typing import Final

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from gateway.scaling import Scaling
from gateway.service import JobService
from img2img import telemetry
from img2img.errors import Unavailable

ROUTE_TYPES: Final = re.compile(r":\w+(?=})")
METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
OTHER: Final = "_OTHER"
"""Stands for what a client may write as it likes: labels have few values."""
NO_ANSWER: Final = "none"
SCRAPE_PATIENCE: Final = 3.0
"""Seconds for the queue server to answer a scrape; Prometheus itself gives up after 10."""

log = structlog.get_logger(__name__)


def route_of(scope: Scope) -> str:
    """The route of a request that was routed, without the types of its parameters; else ``_OTHER``."""
    return ROUTE_TYPES.sub("", scope.get("path_template", OTHER))


class AnswerBrokeOff(Exception):
    """An answer that had begun cannot be ended: names what kind of error it was, and nothing else."""


def measured(app: ASGIApp) -> ASGIApp:
    """The application with each request timed, from its first byte here to the last one of its answer."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        status, began = NO_ANSWER, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        failed = None
        try:
            await app(scope, receive, sending)
        except Exception as exc:
            log.exception("answer_broke_off")
            failed = type(exc).__name__
        finally:
            if scope["type"] == ScopeType.HTTP:
                _note(scope, status, time.perf_counter() - began)
        if failed is not None:
            # Raised anew and outside: a span keeps the words of what it sees, and these may quote a request.
            raise AnswerBrokeOff(failed)

    return call


def _note(scope: HTTPScope, status: str, seconds: float) -> None:
    method = scope["method"] if scope["method"] in METHODS else OTHER
    telemetry.observe(telemetry.HTTP_SECONDS.labels(route_of(scope), method, status), seconds)


async def read_queues(service: JobService, scaling: Scaling) -> None:
    """Set the gauges to what the queue server says now; where it does not answer only ``QUEUE_UP`` is there.

    It takes one trip for each pool, another one for each that has a price, and one more for all of these.
    """
    try:
        async with asyncio.timeout(SCRAPE_PATIENCE):
            pools, spent = (await service.stats()).pools, await service.spent_today()
    except (TimeoutError, Unavailable) as exc:
        log.warning("queues_not_scraped", error=str(exc) or "the queue server is silent")
        pools, spent = {}, {}
    # Nothing is awaited between here and the text, so that scrapes at the same time see no gauges of each other's.
    for gauge in telemetry.OF_QUEUES:
        gauge.clear()
    telemetry.QUEUE_UP.set(bool(pools))
    for queue, stats in pools.items():
        for state in ("queued", "delayed", "running", "quarantined"):
            telemetry.QUEUE_JOBS.labels(queue, state).set(getattr(stats, state))
        telemetry.QUEUE_OLDEST_SECONDS.labels(queue).set(stats.oldest_seconds)
        telemetry.WORKERS.labels(queue).set(len(stats.workers))
    for queue, signal in scaling.signals_of(pools).items():
        telemetry.QUEUE_BACKLOG_SECONDS.labels(queue).set(signal.backlog_seconds)
        telemetry.QUEUE_DEMAND_SECONDS.labels(queue).set(signal.demand_seconds)
    for queue, (amount, cap) in spent.items():
        telemetry.QUEUE_SPEND.labels(queue).set(amount)
        if cap is not None:
            telemetry.QUEUE_SPEND_CAP.labels(queue).set(cap)

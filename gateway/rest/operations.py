"""Health and metrics, for machines; they need no key and name no account."""

import asyncio
from typing import Final

from litestar import Response, get
from litestar.openapi.datastructures import ResponseSpec
from prometheus_client import REGISTRY, Gauge
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from gateway.rest.context import FrontDependency
from gateway.rest.openapi import PublicOperation
from gateway.rest.problems import on_img2img_error
from img2img.errors import Img2ImgError, Unavailable

READY_SECONDS: Final = 3.0
"""How long the queue server may take before it counts as unavailable; calls have more patience."""

QUEUE_JOBS = Gauge("img2img_queue_jobs", "Jobs by queue and state", ["queue", "state"])
WORKERS = Gauge("img2img_workers", "Workers alive", ["queue"])


@get("/health/live", tags=["health"], operation_class=PublicOperation)
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@get(
    "/health/ready",
    tags=["health"],
    operation_class=PublicOperation,
    responses={503: ResponseSpec(dict[str, str | int], description="Jobs could not be taken, or would not be run")},
)
async def ready(front: FrontDependency) -> Response[dict[str, str | int]]:
    """200 once jobs can be taken and run: not draining, the queue server answers, a worker is alive.

    Workers that are ``paused``, because a service that they call takes nothing now, count: other gateways have no more.
    """
    if front.service.draining:
        return Response({"status": "draining"}, status_code=503)
    try:
        async with asyncio.timeout(READY_SECONDS):
            stats = await front.service.stats()
    except TimeoutError:
        return Response({"status": "queue server silent"}, status_code=503)
    except Unavailable as exc:
        return Response({"status": "queue server unavailable", "detail": str(exc)}, status_code=503)
    if not stats.workers:
        return Response({"status": "no worker", "workers": 0}, status_code=503)
    paused = sum(worker.paused for worker in stats.workers)
    return Response({"status": "ready", "workers": len(stats.workers), "paused": paused})


@get("/metrics", include_in_schema=False, exception_handlers={Img2ImgError: on_img2img_error})
async def metrics(front: FrontDependency) -> Response[bytes]:
    """OpenMetrics text; queue gauges are read at the moment of the scrape."""
    for queue, stats in (await front.service.stats()).pools.items():
        for state in ("queued", "delayed", "running", "quarantined"):
            QUEUE_JOBS.labels(queue, state).set(getattr(stats, state))
        WORKERS.labels(queue).set(len(stats.workers))
    text: bytes = generate_latest(REGISTRY)  # type: ignore[no-untyped-call]
    return Response(text, media_type=CONTENT_TYPE_LATEST)

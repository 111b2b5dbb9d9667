"""Health and metrics, for machines; they need no key and name no account."""

import asyncio
from typing import Final

from litestar import Response, get
from litestar.openapi.datastructures import ResponseSpec

from gateway.rest.context import AnyRequest, FrontDependency
from gateway.rest.measures import read_queues
from gateway.rest.openapi import PublicOperation
from img2img import telemetry
from img2img.errors import Unavailable

READY_SECONDS: Final = 3.0
"""How long the queue server may take before it counts as unavailable; calls have more patience."""


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


@get("/metrics", include_in_schema=False)
async def metrics(request: AnyRequest, front: FrontDependency) -> Response[bytes]:
    """The process's own metrics, and the queues' gauges as they are at this moment."""
    await read_queues(front.service, front.scaling)
    text, media_type = telemetry.exposition(telemetry.GATEWAY, request.headers.get("accept", ""))
    # As a header: Litestar adds a charset to each text of which it makes one.
    return Response(text, headers={"content-type": media_type})

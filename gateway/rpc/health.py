"""The standard health service, ``grpc.health.v1.Health``: one state for the whole server.

grpcio-health-checking's own servicer is not used: when one of its watchers leaves, the others hear of no
further change, and one that reads nothing holds up every change, a shutdown's too.
"""

import asyncio
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from gateway.rpc.interceptor import SERVICE

SERVICES: Final = frozenset({"", SERVICE})

NOT_SERVING: Final[int] = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING: Final[int] = health_pb2.HealthCheckResponse.SERVING
SERVICE_UNKNOWN: Final[int] = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until told otherwise, and for good once closed."""

    def __init__(self) -> None:
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        self._serving = serving and not self._closed
        self._ring()

    def close(self) -> None:
        """Answer NOT_SERVING from now on, and let go of the watchers, who would hold up the server's end."""
        self._closed = True
        self._serving = False
        self._ring()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "No such service here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        sent = None
        while True:
            # Read together: what comes while the status is on its way is told in the next round.
            changed, closed, status = self._changed, self._closed, self._status(request.service)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if closed:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The server is shutting down")
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in SERVICES:
            return SERVICE_UNKNOWN
        return SERVING if self._serving else NOT_SERVING

    def _ring(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

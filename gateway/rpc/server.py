"""The gRPC server: our service, health and reflection on one port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from gateway.budget import Budgets
from gateway.certificates import Certificates
from gateway.drain import Drain
from gateway.rpc.health import HealthServicer
from gateway.rpc.interceptor import SERVICE, CallInterceptor
from gateway.rpc.listening import OPTIONS, bind
from gateway.rpc.servicer import Img2ImgServicer
from gateway.service import JobService
from gateway.tenants import Tenants
from img2img.settings import Settings
from img2img.v1.img2img_pb2_grpc import add_Img2ImgServiceServicer_to_server

CONNECTION_SECONDS: Final = 300.0
"""How old a connection becomes, a tenth more or less: clients would stay on one gateway for ever, though others came.
Calls and streams that have begun end where they are.
"""


class RpcServer:
    """A running server and the port it listens on."""

    def __init__(
        self, server: grpc.aio.Server, port: int, health_servicer: HealthServicer, drain_timeout: float
    ) -> None:
        self.server = server
        self.port = port
        self._health = health_servicer
        self._drain_timeout = drain_timeout

    def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the whole server and for our service; at first NOT_SERVING."""
        self._health.set_serving(serving)

    async def stop(self) -> None:
        """Take no new calls from now on, and give those in flight the drain limit to end; may be repeated."""
        self._health.close()
        await self.server.stop(self._drain_timeout)


@asynccontextmanager
async def open_server(
    service: JobService,
    tenants: Tenants,
    settings: Settings,
    budgets: Budgets,
    drain: Drain,
    certificates: Certificates | None,
) -> AsyncIterator[RpcServer]:
    """Serve on ``settings.grpc_port`` (0 for any); on leaving, calls get ``settings.drain_timeout`` to end.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    health_servicer, interceptor = HealthServicer(), CallInterceptor(tenants, budgets)
    server = grpc.aio.server(interceptors=[interceptor], options=_options(settings))
    add_Img2ImgServiceServicer_to_server(Img2ImgServicer(service, settings, drain), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = bind(server, settings, "grpc_port", certificates)
    await server.start()
    rpc = RpcServer(server, port, health_servicer, settings.drain_timeout)
    try:
        yield rpc
    finally:
        await rpc.stop()
        await interceptor.finish()


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        *OPTIONS,
        ("grpc.max_connection_age_ms", int(CONNECTION_SECONDS * 1000)),
        ("grpc.max_receive_message_length", settings.max_grpc_message),
        ("grpc.max_send_message_length", -1),  # what we send is bounded where it is made
    ]

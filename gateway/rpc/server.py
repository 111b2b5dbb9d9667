"""The gRPC server: our service, health and reflection on one port."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from gateway.budget import Budgets
from gateway.drain import Drain
from gateway.rpc.health import HealthServicer
from gateway.rpc.interceptor import SERVICE, CallInterceptor
from gateway.rpc.servicer import Img2ImgServicer
from gateway.service import JobService
from gateway.tenants import Tenants
from img2img.errors import ConfigurationError
from img2img.settings import Settings
from img2img.v1.img2img_pb2_grpc import add_Img2ImgServiceServicer_to_server

KEEPALIVE_SECONDS: Final = 30
"""How often a silent client is asked whether it is still there; calls of one that is not are cancelled."""
KEEPALIVE_PATIENCE: Final = 10
CLIENT_PING_SECONDS: Final = 10
"""Clients may ask as often as this; gRPC's default of five minutes would cut off those behind a NAT."""


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
    service: JobService, tenants: Tenants, settings: Settings, budgets: Budgets, drain: Drain
) -> AsyncIterator[RpcServer]:
    """Serve on ``settings.grpc_port`` (0 for any); on leaving, calls get ``settings.drain_timeout`` to end.

    Raises:
        ConfigurationError: the port cannot be had, or the certificate and its key are of no use.
    """
    health_servicer, interceptor = HealthServicer(), CallInterceptor(tenants, budgets)
    server = grpc.aio.server(interceptors=[interceptor], options=_options(settings))
    add_Img2ImgServiceServicer_to_server(Img2ImgServicer(service, settings, drain), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _bind(server, settings)
    await server.start()
    rpc = RpcServer(server, port, health_servicer, settings.drain_timeout)
    try:
        yield rpc
    finally:
        await rpc.stop()
        await interceptor.finish()


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_grpc_message),
        ("grpc.max_send_message_length", -1),  # what we send is bounded where it is made
        ("grpc.so_reuseport", 0),  # a second gateway on this port must fail, not take half of the calls
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_PATIENCE * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_SECONDS * 1000),
    ]


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    credentials = _credentials(settings)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        raise ConfigurationError(
            f"Cannot listen on {address}: end what uses the port, or change IMG2IMG_GRPC_PORT (or IMG2IMG_HOST)"
        ) from exc


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    certificate, key = _read("IMG2IMG_TLS_CERT", settings.tls_cert), _read("IMG2IMG_TLS_KEY", settings.tls_key)
    try:
        # gRPC itself would only say that it cannot bind. Without the password it would ask on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except ssl.SSLError as exc:
        raise ConfigurationError(
            f"IMG2IMG_TLS_CERT and IMG2IMG_TLS_KEY must be a PEM certificate and its own, unencrypted key: {exc.reason}"
        ) from exc
    return grpc.ssl_server_credentials([(key, certificate)])


def _read(variable: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"{variable}: {path} cannot be read: {exc.strerror}") from exc

"""How a gRPC server gets its port, and options of every one."""

from typing import Final

import grpc.aio

from gateway.certificates import Certificates
from gateway.sockets import listen
from img2img.errors import ConfigurationError
from img2img.settings import PREFIX, Settings

KEEPALIVE_SECONDS: Final = 30
"""How often a silent client is asked whether it is still there; calls of one that is not are cancelled."""
KEEPALIVE_PATIENCE: Final = 10
CLIENT_PING_SECONDS: Final = 10
"""Clients may ask as often as this; gRPC's default of five minutes would cut off those behind a NAT."""
OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second gateway on this port must fail, not take half of the calls
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_PATIENCE * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_SECONDS * 1000),
)
"""Of every server."""


def bind(server: grpc.aio.Server, settings: Settings, setting: str, certificates: Certificates | None) -> int:
    """Listen on the settings' host and the port that ``setting`` names, with TLS if there are ``certificates``; answers
    with the port.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    # First as a plain socket: gRPC would write a line of its own to standard error, and say less.
    listen(settings, setting).close()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{getattr(settings, setting)}"
    try:
        if certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, certificates.credentials())
    except RuntimeError as exc:
        raise ConfigurationError(
            f"Cannot listen on {address}: change {PREFIX}{setting.upper()} (or IMG2IMG_HOST)"
        ) from exc

"""How a gRPC server gets its port and its certificates."""

import ssl
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

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


def bind(server: grpc.aio.Server, settings: Settings, setting: str, credentials: grpc.ServerCredentials | None) -> int:
    """Listen on the settings' host and the port that ``setting`` names; answers with the port.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    # First as a plain socket: gRPC would write a line of its own to standard error, and say less.
    listen(settings, setting).close()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{getattr(settings, setting)}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as exc:
        raise ConfigurationError(f"Cannot listen on {address}: change {_variable(setting)} (or IMG2IMG_HOST)") from exc


def credentials_of(
    settings: Settings, cert: str, key: str, client_ca: str | None = None
) -> grpc.ServerCredentials | None:
    """What the files that these settings name make; None where there are none.

    With ``client_ca`` only clients with a certificate of that authority are let in.

    Raises:
        ConfigurationError: a file is of no use; names its setting.
    """
    cert_path, key_path = getattr(settings, cert), getattr(settings, key)
    if cert_path is None or key_path is None:
        return None
    certificate, private = _read(cert, cert_path), _read(key, key_path)
    try:
        # gRPC itself would only say that it cannot bind. Without the password it would ask on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert_path, key_path, password="")
    except ssl.SSLError as exc:
        raise ConfigurationError(
            f"{_variable(cert)} and {_variable(key)} must be a PEM certificate and its own, unencrypted key: "
            f"{exc.reason or 'one of them is no PEM'}"
        ) from exc
    if client_ca is None:
        return grpc.ssl_server_credentials([(private, certificate)])
    authority = _read(client_ca, getattr(settings, client_ca))
    try:
        context.load_verify_locations(cadata=authority.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigurationError(f"{_variable(client_ca)} must be the PEM certificate of an authority") from exc
    return grpc.ssl_server_credentials([(private, certificate)], root_certificates=authority, require_client_auth=True)


def _variable(setting: str) -> str:
    return f"{PREFIX}{setting.upper()}"


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"{_variable(setting)}: {path} cannot be read: {exc.strerror}") from exc

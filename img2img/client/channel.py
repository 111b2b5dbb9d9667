"""The connection that both clients open, and what its errors mean."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from img2img.client.values import ClientError, Violation

DEFAULT_SERVER: Final = "127.0.0.1:50051"
SHORT_TIMEOUT: Final = 30.0
MAX_MESSAGE: Final = 64 * 1024 * 1024
SERVICE: Final = "img2img.v1.Img2ImgService"
ETA_KEY: Final = "eta_seconds"
STATUS_KEY: Final = "grpc-status-details-bin"
RETRIED: Final = ("Generate", "CreateJob", "GetJob", "ListJobs", "CancelJob", "ReplayJob", "GetResult")
RETRY_POLICY: Final = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
LOOPBACK: Final = ("127.", "localhost:", "[::1]:", "unix:")


class RpcStatus(Protocol):
    """What the errors of both kinds of channel know."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[Any] | None: ...


def channel_options(server: str) -> list[tuple[str, Any]]:
    # Repeating a call after a broken connection is safe: every job request has an idempotency key, and a job that
    # was canceled or replayed already stays as it is.
    retries = {"name": [{"service": SERVICE, "method": method} for method in RETRIED]}
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps({"methodConfig": [{**retries, "retryPolicy": RETRY_POLICY}]})),
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        # Less than gRPC's patience between two tries to connect, so that a restart is noticed soon.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # A watched job may say nothing for long: find out when the service's machine is gone.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if server.startswith(LOOPBACK):
        # A proxy in the environment is not for this machine.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def channel_credentials(tls: bool, ca: Path | None) -> grpc.ChannelCredentials | None:
    if not (tls or ca):
        return None
    return grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)


def call_metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call.

    Raises:
        ClientError: no header can hold the key.
    """
    if key and not (key.isascii() and key.isprintable()):
        raise ClientError("unauthenticated", "The access key has a character that no key has: look for line breaks")
    return (("authorization", f"Bearer {key}"),) if key else ()


def client_error(error: RpcStatus, server: str) -> ClientError:
    """Translate a failed call; the service's own details win over gRPC's."""
    status = error.code()
    code, message = status.name.lower(), error.details() or status.name
    violations: tuple[Violation, ...] = ()
    retry_after = eta_seconds = None
    details = _details(error)
    if not details and status is grpc.StatusCode.UNAVAILABLE:
        message = f"No service answers at {server}: {message}"
    for detail in details:
        match detail:
            case error_details_pb2.ErrorInfo():
                code = detail.reason
                eta_seconds = float(detail.metadata[ETA_KEY]) if ETA_KEY in detail.metadata else None
            case error_details_pb2.BadRequest():
                violations = tuple(Violation(item.field, item.description) for item in detail.field_violations)
            case error_details_pb2.RetryInfo():
                retry_after = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
    return ClientError(code, message, violations, retry_after, eta_seconds)


def _details(error: RpcStatus) -> list[Any]:
    """The messages packed into the trailing metadata, of the kinds that this client reads."""
    found = []
    for key, value in error.trailing_metadata() or ():
        if key != STATUS_KEY or isinstance(value, str):
            continue
        for packed in status_pb2.Status.FromString(value).details:
            for kind in (
                error_details_pb2.ErrorInfo,
                error_details_pb2.BadRequest,
                error_details_pb2.RetryInfo,
            ):
                if packed.Is(kind.DESCRIPTOR):
                    detail = kind()
                    packed.Unpack(detail)
                    found.append(detail)
    return found

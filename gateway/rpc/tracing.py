"""A span per call, after OpenTelemetry's conventions for RPC servers, and how long it took.

opentelemetry-instrumentation-grpc is not used: it records a call that was cancelled, or that ran into its
deadline, as OK, because both reach a handler as a cancellation that it does not look at.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import unquote

import grpc
import grpc.aio
from grpc import StatusCode
from opentelemetry.trace import SpanKind
from opentelemetry.trace import StatusCode as SpanStatus

from img2img import telemetry, tracing

DEADLINE_SLACK: Final = 0.05
"""gRPC's timers may end a call this many seconds before its deadline."""
SERVER_FAULTS: Final = frozenset(
    {
        StatusCode.UNKNOWN,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.UNIMPLEMENTED,
        StatusCode.INTERNAL,
        StatusCode.UNAVAILABLE,
        StatusCode.DATA_LOSS,
    }
)


@contextmanager
def server_span(method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
    """The span of one call to ``method`` (``/service/method``), child of the one that its metadata names.

    The trailing metadata of the answer tell of it, as ``traceresponse``.
    """
    name = method.removeprefix("/")
    with tracing.tracer.start_as_current_span(
        name,
        context=tracing.propagator.extract(_carrier(context)),
        kind=SpanKind.SERVER,
        attributes={"rpc.system.name": "grpc", "rpc.method": name, **_peer(context.peer())},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        if (told := tracing.trace_response()) is not None:
            context.set_trailing_metadata((("traceresponse", told),))
        status, began = StatusCode.UNKNOWN, time.perf_counter()
        try:
            yield
            status = StatusCode.OK
        except grpc.aio.AbortError:
            status = context.code()
            raise
        except asyncio.CancelledError:
            status = StatusCode.DEADLINE_EXCEEDED if is_past_deadline(context) else StatusCode.CANCELLED
            raise
        finally:
            telemetry.observe(telemetry.RPC_SECONDS.labels(name, status.name), time.perf_counter() - began)
            span.set_attribute("rpc.response.status_code", status.name)
            if status in SERVER_FAULTS:
                span.set_attribute("error.type", status.name)
                span.set_status(SpanStatus.ERROR)


def is_past_deadline(context: grpc.aio.ServicerContext[Any, Any]) -> bool:
    """Whether the caller's deadline has come; tells a cancelled call's two reasons apart."""
    left: float | None = context.time_remaining()
    return left is not None and left <= DEADLINE_SLACK


def _carrier(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _peer(peer: str) -> dict[str, str | int]:
    """Address and port of ``ipv4:127.0.0.1:50000`` or ``ipv6:%5B::1%5D:50000``."""
    address, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    if not port.isdecimal():
        return {"network.peer.address": peer}
    return {"network.peer.address": address.strip("[]"), "network.peer.port": int(port)}

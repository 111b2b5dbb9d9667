"""What surrounds every method of our service: its span, its caller's account, and its errors."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from gateway.budget import Budgets, Reservation
from gateway.rpc.errors import abort, to_status
from gateway.rpc.tracing import server_span
from gateway.tenants import Tenants
from img2img import tracing
from img2img.errors import Img2ImgError, MalformedBody

SERVICE: Final = "img2img.v1.Img2ImgService"
TIDY_SECONDS: Final = 10.0
UNEXPECTED: Final = "The gateway failed unexpectedly: try again, and look into its log"

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context = grpc.aio.ServicerContext[Any, Any]

caller: Final[ContextVar[str]] = ContextVar("caller")
"""The account that the current call belongs to; each call runs in a task, and so in a context, of its own."""
share: Final[ContextVar[Reservation]] = ContextVar("share")
"""What the current call's message holds of the budget; a method that has let go of its request may release it."""

log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of our service; health and reflection need no key and leave no span.

    Methods that stream write to their context and return, so that unary and streaming ones look alike here
    and everything they opened is closed in their own task when the caller goes away. To gRPC every request is
    a stream, of one message: it would hold a message that it reads by itself until the call's end.
    """

    def __init__(self, tenants: Tenants, budgets: Budgets) -> None:
        self._tenants = tenants
        self._budgets = budgets
        self._calls: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Wait for calls that tidy up after their caller has gone: to gRPC they have ended, and it does not."""
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=TIDY_SECONDS)
            for task in late:
                task.cancel()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(f"/{SERVICE}/"):
            return handler

        async def call(_: object, context: Context) -> Any:
            self._track()
            with server_span(method, context):
                return await self._answer(method, handler, context)

        # No deserializer, so that a broken message is an error like any other.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)

    async def _answer(self, method: str, handler: Handler, context: Context) -> Any:
        behavior: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        try:
            caller.set(self._authenticate(context))
            raw = await context.read()
            size = len(raw) if isinstance(raw, bytes) else 0
            with self._budgets.reserve(size) as held:
                held.hold(size)
                share.set(held)
                request = [_decode(handler, raw)]
                del raw
                if job_id := getattr(request[0], "id", ""):
                    tracing.name_job(job_id)
                return await behavior(request.pop(), context)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError as exc:
            # A write that gRPC cannot deliver: the caller is gone, and the cancellation is still on its way.
            raise asyncio.CancelledError from exc
        except Img2ImgError as exc:
            await abort(context, to_status(exc))
        except Exception:
            log.exception("rpc_failed", method=method)
            await abort(context, to_status(Img2ImgError(UNEXPECTED)))

    def _track(self) -> None:
        if task := asyncio.current_task():
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    def _authenticate(self, context: Context) -> str:
        metadata = context.invocation_metadata() or ()
        given = next((value for key, value in metadata if key == "authorization"), None)
        return self._tenants.authenticate(given if isinstance(given, str) else None)


def _decode(handler: Handler, raw: object) -> Any:
    if not isinstance(raw, bytes):
        raise MalformedBody("The call has no message: send one")
    try:
        return handler.request_deserializer(raw)  # type: ignore[misc]
    except DecodeError as exc:
        raise MalformedBody("The message is not what the method takes: check it against img2img.proto") from exc

"""Errors as gRPC answers: one table from class to status, and google.rpc details beside it.

Every answer carries ``ErrorInfo`` (``reason`` is our stable code); a wrong field adds ``BadRequest``, an error
that goes away by itself ``RetryInfo``, a full quota ``QuotaFailure``. What gRPC refuses before a method runs
has a status and a message only: an unknown method (UNIMPLEMENTED), a message above the size limit
(RESOURCE_EXHAUSTED, which names both sizes).
"""

from collections.abc import Iterator
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode
from grpc_status import rpc_status  # type: ignore[import-untyped]

from img2img import errors
from img2img.errors import Congested, Img2ImgError, InvalidRequest, Retryable, most_specific

DOMAIN: Final = "img2img"
ETA_KEY: Final = "eta_seconds"
"""In ``ErrorInfo.metadata``: the ``eta`` of a ``Congested`` error."""
MAX_TEXT: Final = 1024
"""Bytes of a message: an error travels in headers, of which clients take 8 KiB, and it can quote the request."""

STATUS: Final[dict[type[Img2ImgError], StatusCode]] = {
    errors.Img2ImgError: StatusCode.INTERNAL,
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.MalformedBody: StatusCode.INVALID_ARGUMENT,
    errors.MissingBody: StatusCode.INVALID_ARGUMENT,
    errors.RequestTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.AccountMismatch: StatusCode.PERMISSION_DENIED,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.ResidencyConflict: StatusCode.PERMISSION_DENIED,
    errors.IdempotencyConflict: StatusCode.ALREADY_EXISTS,
    errors.NotReplayable: StatusCode.FAILED_PRECONDITION,
    errors.ResultNotReady: StatusCode.FAILED_PRECONDITION,
    errors.ResultGone: StatusCode.NOT_FOUND,
    errors.Retryable: StatusCode.UNAVAILABLE,
    errors.NoCapacity: StatusCode.RESOURCE_EXHAUSTED,
    errors.Congested: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyBytesInFlight: StatusCode.RESOURCE_EXHAUSTED,
    errors.WaitTimeout: StatusCode.DEADLINE_EXCEEDED,
    errors.ClientClosed: StatusCode.CANCELLED,
    errors.ConfigurationError: StatusCode.INTERNAL,
    errors.LeaseLost: StatusCode.ABORTED,
    errors.JobError: StatusCode.INTERNAL,
    errors.UpstreamFailed: StatusCode.UNAVAILABLE,
    errors.UpstreamBusy: StatusCode.RESOURCE_EXHAUSTED,
    errors.UpstreamUnknown: StatusCode.UNKNOWN,
    errors.ModelRefused: StatusCode.INVALID_ARGUMENT,
    errors.UnsafeOutput: StatusCode.INVALID_ARGUMENT,
    errors.InputGone: StatusCode.ABORTED,
    errors.JobCanceled: StatusCode.CANCELLED,
    errors.JobExpired: StatusCode.DEADLINE_EXCEEDED,
}
QUOTAS: Final[dict[type[Img2ImgError], str]] = {
    errors.RequestTooLarge: "request size",
    errors.NoCapacity: "free workers",
    errors.QueueFull: "queued jobs",
    errors.AccountQueueFull: "queued jobs of the account",
    errors.DeadlineUnreachable: "time until the deadline",
    errors.SpendCapReached: "spend of the day",
    errors.TooManyBytesInFlight: "request bytes in flight",
}


def to_status(error: Img2ImgError, **metadata: str) -> status_pb2.Status:
    """The answer to an error of ours; ``metadata`` goes into its ``ErrorInfo``."""
    status = status_pb2.Status(code=most_specific(STATUS, error).value[0], message=_short(str(error)))
    for detail in _details(error, metadata):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> NoReturn:
    """End the call with a rich status.

    Raises:
        AbortError: always; let it pass.
    """
    answer = rpc_status.to_status(status)
    await context.abort(answer.code, answer.details, (*context.trailing_metadata(), *answer.trailing_metadata))


def _details(error: Img2ImgError, metadata: dict[str, str]) -> Iterator[Message]:
    if isinstance(error, Congested) and error.eta is not None:
        metadata = metadata | {ETA_KEY: str(error.eta)}
    yield error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=metadata)
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_short(error.field), description=_short(error.reason)
        )
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if isinstance(error, Retryable):
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if subject := QUOTAS.get(type(error)):
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=subject, description=_short(str(error)))
        yield error_details_pb2.QuotaFailure(violations=[exceeded])


def _short(text: str) -> str:
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore")

"""Cloudflare's envelope and error codes.

Codes, statuses and texts are those that Workers AI documents or was seen to send. Where Cloudflare documents none
(a worker that failed, an idempotency conflict) the nearest family is used; docs/cloudflare.md lists them.
"""

import math
from typing import Any, Final

import msgspec
import structlog
from litestar import Response
from litestar.exceptions import HTTPException
from uuid_utils import uuid4

from gateway.rest.context import AnyRequest
from gateway.rest.problems import CODE_HEADER, wrong_parameter
from img2img import errors
from img2img.errors import Img2ImgError, Retryable, most_specific

REQUEST_ID: Final = "cf-ai-req-id"
MODEL_LAYER: Final[dict[str, Any]] = {}
"""``result`` of an error from the model layer; errors at the API's edge have null."""

log = structlog.get_logger(__name__)


class EnvelopeError(msgspec.Struct, frozen=True):
    """Cloudflare's number, and a message that ends with the id in ``cf-ai-req-id``."""

    code: int
    message: str


class Envelope(msgspec.Struct, frozen=True):
    """What surrounds every JSON answer; ``result`` is empty or null in an error."""

    result: dict[str, Any] | None
    success: bool
    errors: list[EnvelopeError]
    messages: list[Any]


class Dialect(msgspec.Struct, frozen=True):
    """One error in Cloudflare's words; ``{detail}``, ``{id}`` and ``{path}`` are filled in."""

    code: int
    status: int
    text: str
    edge: bool = False
    retry: bool | None = None
    """``x-should-retry``: None leaves it to the SDK's own rule for the status."""


NO_CAPACITY: Final = Dialect(3040, 429, "AiError: Capacity temporarily exceeded, please try again. ({id})")
ERRORS: Final[dict[type[Img2ImgError], Dialect]] = {
    errors.Img2ImgError: Dialect(3043, 500, "AiError: Internal server error: {detail} ({id})"),
    errors.InvalidRequest: Dialect(5006, 400, "AiError: Bad input: Error: {detail} ({id})"),
    errors.InvalidImage: Dialect(3010, 400, "AiError: Invalid or incomplete input for the model: {detail} ({id})"),
    errors.Unsupported: Dialect(3030, 400, "AiError: Model input is not valid: {detail} ({id})"),
    errors.MalformedBody: Dialect(3010, 400, "AiError: Invalid or incomplete input for the model: {detail} ({id})"),
    errors.MissingBody: Dialect(3003, 400, "AiError: Request is missing headers or body: body ({id})"),
    errors.RequestTooLarge: Dialect(3006, 413, "AiError: Request is too large: {detail} ({id})"),
    errors.Unauthenticated: Dialect(10000, 401, "Authentication error", edge=True),
    errors.MissingCredentials: Dialect(9106, 403, "Missing X-Auth-Email header", edge=True),
    errors.NotFound: Dialect(
        7003, 404, "Could not route to {path}, perhaps your object identifier is invalid?", edge=True
    ),
    errors.JobNotFound: Dialect(7003, 404, "AiError: {detail} ({id})"),
    errors.ModelNotFound: Dialect(5007, 400, "AiError: {detail} ({id})"),
    errors.ModelNameInvalid: Dialect(3042, 404, "AiError: The model name is invalid: {detail} ({id})"),
    errors.ResidencyConflict: Dialect(
        5018, 403, "AiError: This account is not allowed to access this model: {detail} ({id})"
    ),
    errors.IdempotencyConflict: Dialect(3010, 409, "AiError: {detail} ({id})", retry=False),
    errors.NotReplayable: Dialect(3010, 409, "AiError: {detail} ({id})", retry=False),
    errors.ResultNotReady: Dialect(3010, 409, "AiError: {detail} ({id})", retry=False),
    errors.ResultGone: Dialect(3010, 410, "AiError: {detail} ({id})"),
    errors.Retryable: Dialect(3043, 503, "AiError: Internal server error: {detail} ({id})"),
    errors.NoCapacity: NO_CAPACITY,
    errors.Congested: NO_CAPACITY,
    # Gone at the end of the day, which no SDK's retries reach.
    errors.SpendCapReached: Dialect(3036, 429, "AiError: Daily allocation used up: {detail} ({id})", retry=False),
    errors.TooManyBytesInFlight: NO_CAPACITY,
    errors.WaitTimeout: Dialect(3007, 408, "AiError: Request timeout: {detail} ({id})"),
    errors.ClientClosed: Dialect(3008, 408, "AiError: Request was aborted ({id})"),
    # The job has had all its attempts: an SDK that sends it again would only double them.
    errors.JobError: Dialect(3043, 500, "AiError: Internal server error: {detail} ({id})", retry=False),
    errors.UpstreamBusy: Dialect(
        3040, 429, "AiError: Capacity temporarily exceeded, please try again. {detail} ({id})", retry=False
    ),
    errors.ModelRefused: Dialect(3030, 400, "AiError: Model input is not valid: {detail} ({id})"),
    errors.UnsafeOutput: Dialect(3030, 400, "AiError: Output has been flagged: {detail} ({id})"),
    errors.JobCanceled: Dialect(3008, 408, "AiError: Request was aborted: {detail} ({id})", retry=False),
    errors.JobExpired: Dialect(3007, 408, "AiError: Request timeout: {detail} ({id})", retry=False),
}
HTTP_ERRORS: Final = {
    405: Dialect(10405, 405, "Method not allowed for this authentication scheme", edge=True),
}
NO_ROUTE: Final = Dialect(7000, 400, "No route for that URI", edge=True)


def new_request_id() -> str:
    return str(uuid4())


def success(result: Any, request_id: str, **more: Any) -> Response[bytes]:
    """A JSON result in its envelope."""
    body = {"result": result, "success": True, "errors": [], "messages": [], **more}
    return Response(msgspec.json.encode(body), media_type="application/json", headers={REQUEST_ID: request_id})


def failure(request: AnyRequest, error: Img2ImgError) -> Response[bytes]:
    """Any error of ours in Cloudflare's envelope; never with status 200."""
    headers = {CODE_HEADER: error.code}
    if isinstance(error, Retryable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return _respond(request, most_specific(ERRORS, error), str(error), headers)


def error_message(error: Img2ImgError, request_id: str) -> dict[str, Any]:
    """One entry of ``errors``, for a response inside a batch."""
    dialect = most_specific(ERRORS, error)
    return {"code": dialect.code, "message": dialect.text.format(detail=error, id=request_id, path="")}


def _respond(request: AnyRequest, dialect: Dialect, detail: str, headers: dict[str, str]) -> Response[bytes]:
    request_id = request.scope.get("state", {}).get(REQUEST_ID) or new_request_id()
    text = dialect.text.format(detail=detail, id=request_id, path=request.url.path)
    body = {
        "result": None if dialect.edge else MODEL_LAYER,
        "success": False,
        "errors": [{"code": dialect.code, "message": text}],
        "messages": [],
    }
    if not dialect.edge:
        headers[REQUEST_ID] = request_id
    if dialect.retry is not None:
        headers["x-should-retry"] = "true" if dialect.retry else "false"
    return Response(
        msgspec.json.encode(body), status_code=dialect.status, media_type="application/json", headers=headers
    )


def on_img2img_error(request: AnyRequest, error: Img2ImgError) -> Response[bytes]:
    return failure(request, error)


def on_http_exception(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: no such route, the wrong method, a query parameter of the wrong form."""
    if (wrong := wrong_parameter(error)) is not None:
        return failure(request, wrong)
    dialect = HTTP_ERRORS.get(error.status_code, NO_ROUTE)
    return _respond(request, dialect, error.detail, {CODE_HEADER: "http"})


def on_unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    """A defect of ours: logged whole, shown without details."""
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    return failure(request, Img2ImgError("something went wrong on our side"))

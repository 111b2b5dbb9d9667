"""Errors of the native API: ``application/problem+json`` (RFC 9457) with our stable ``code``."""

import math
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from litestar import Response
from litestar.exceptions import HTTPException

from gateway.rest.context import AnyRequest
from img2img import errors
from img2img.errors import Congested, Img2ImgError, InvalidRequest, Retryable, most_specific

PROBLEM_JSON: Final = "application/problem+json"
CODE_HEADER: Final = "img2img-error"

STATUS: Final[dict[type[Img2ImgError], int]] = {
    errors.Img2ImgError: 500,
    errors.InvalidRequest: 400,
    errors.MalformedBody: 400,
    errors.MissingBody: 400,
    errors.RequestTooLarge: 413,
    errors.Unauthenticated: 401,
    errors.AccountMismatch: 403,
    errors.NotFound: 404,
    errors.ResidencyConflict: 403,
    errors.IdempotencyConflict: 409,
    errors.NotReplayable: 409,
    errors.ResultNotReady: 409,
    errors.ResultGone: 410,
    errors.Retryable: 503,
    errors.NoCapacity: 429,
    errors.Congested: 429,
    errors.TooManyBytesInFlight: 429,
    errors.Unavailable: 503,
    errors.WaitTimeout: 408,
    errors.ClientClosed: 499,
    errors.ConfigurationError: 500,
    errors.LeaseLost: 409,
    errors.JobError: 500,
    errors.UpstreamFailed: 502,
    errors.UpstreamBusy: 503,
    errors.UpstreamRefused: 502,
    errors.UpstreamUnknown: 502,
    errors.ModelRefused: 422,
    errors.UnsafeOutput: 422,
    errors.JobCanceled: 409,
    errors.JobExpired: 408,
}
TITLES: Final = {499: "Client Closed Request"}
PARAMETER_NAMES: Final = {"only": "state"}
"""Query parameters whose own names Litestar keeps for itself."""

log = structlog.get_logger(__name__)


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """RFC 9457, with ``code`` (stable), ``field`` (where one is at fault) and ``eta_seconds`` (see ``Congested``)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    eta_seconds: float | None = None


def problem(error: Img2ImgError) -> Response[bytes]:
    """The answer to an error of ours."""
    status = most_specific(STATUS, error)
    headers = {CODE_HEADER: error.code}
    if isinstance(error, Retryable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = 'Bearer realm="img2img"'
    field = error.field if isinstance(error, InvalidRequest) and error.field else None
    eta = error.eta if isinstance(error, Congested) else None
    return _respond(status, str(error), error.code, headers, field=field, eta_seconds=eta)


def _respond(
    status: int, detail: str, code: str, headers: dict[str, str], *, field: str | None = None,
    eta_seconds: float | None = None,
) -> Response[bytes]:  # fmt: skip
    title = TITLES.get(status) or HTTPStatus(status).phrase
    body = Problem("about:blank", title, status, detail, code, field, eta_seconds)
    return Response(msgspec.json.encode(body), status_code=status, media_type=PROBLEM_JSON, headers=headers)


def on_img2img_error(_: AnyRequest, error: Img2ImgError) -> Response[bytes]:
    return problem(error)


def on_http_exception(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: unknown routes, wrong methods, parameters of the wrong form."""
    headers = {name.lower(): value for name, value in (error.headers or {}).items()} | {CODE_HEADER: "http"}
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem(errors.NotFound(f"No route {request.method} {request.url.path}: see /schema"))
    if (wrong := wrong_parameter(error)) is not None:
        return problem(wrong)
    detail = error.detail
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"No {request.method} on {request.url.path}: see /schema"
    return _respond(error.status_code, detail, "http", headers)


def wrong_parameter(error: HTTPException) -> InvalidRequest | None:
    """What Litestar refused about a query parameter, or None if it refused something else."""
    if error.status_code != HTTPStatus.BAD_REQUEST:
        return None
    extra: Any = error.extra
    if not (isinstance(extra, list) and extra):
        return InvalidRequest("", error.detail)
    name = str(extra[0].get("key", ""))
    name = PARAMETER_NAMES.get(name, name)
    return InvalidRequest(name, f"'{name}': {extra[0].get('message', error.detail)}: see /schema")


def on_unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    """A defect of ours: logged whole, shown without details."""
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    return problem(Img2ImgError("Something went wrong on our side: try again, and report it if it stays"))

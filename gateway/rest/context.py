"""What the routes share: the service, who asks, and how a body is read."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.di import NamedDependency
from litestar.exceptions import ClientException

from gateway.budget import Budgets
from gateway.drain import Drain
from gateway.rest.bodies import decode_json, read_body
from gateway.rest.forms import decode_form, is_form
from gateway.rest.pages import refuse_foreign_pages
from gateway.scaling import Scaling
from gateway.service import JobService
from gateway.tenants import Tenants, bearer_from_headers
from img2img.errors import ClientClosed, InvalidRequest
from img2img.settings import Settings

MAX_KEY_LENGTH: Final = 255
BODY_IDLE: Final = 30.0
"""Seconds without a byte of a body that was announced, after which it is given up."""
BODY_RATE: Final = 16 * 1024
"""Bytes per second that a body must come with on average, once ``BODY_IDLE`` seconds have passed."""
_QUOTED: Final = re.compile(r'"[^"]*"')
_WAIT: Final = re.compile(r"(?:^|,)\s*wait\s*=\s*(\d+(?:\.\d+)?)\s*(?:$|[,;])", re.IGNORECASE)

AnyRequest = Request[Any, Any, Any]


class Front(msgspec.Struct, frozen=True):
    """Everything a route needs; one per process, kept in the application's state."""

    service: JobService
    tenants: Tenants
    settings: Settings
    budgets: Budgets
    drain: Drain
    scaling: Scaling

    def authenticate(self, request: AnyRequest, account: str | None = None) -> str:
        """The account of the request's key; ``account`` is the one that its URL names.

        Raises:
            Unauthenticated: no key, an unknown one, or another account's.
        """
        self._refuse_foreign_pages(request)
        return self.tenants.authenticate(_bearer(request), account)

    def authenticate_operator(self, request: AnyRequest) -> None:
        """Let the request pass if its key is an operator's; raises as :meth:`Tenants.authenticate_operator` does."""
        self._refuse_foreign_pages(request)
        self.tenants.authenticate_operator(_bearer(request))

    def _refuse_foreign_pages(self, request: AnyRequest) -> None:
        if not self.tenants.has_keys:  # a page of another site knows none
            refuse_foreign_pages(request.headers)

    @asynccontextmanager
    async def body(
        self, request: AnyRequest, *, forms: bool = False, limit: int | None = None
    ) -> AsyncIterator[object]:
        """The decoded body; its bytes count against the process's budget until the block is left.

        ``limit`` is a bound in bytes below the setting's.

        Raises:
            MissingBody, MalformedBody, RequestTooLarge, TooManyBytesInFlight, InvalidRequest
            ClientClosed: the client went away in the middle of it, or sends too slowly.
            Unavailable: the process ends before the body is complete.
        """
        bound = min(self.settings.max_json_body, self.settings.max_json_body if limit is None else limit)
        length = content_length(request)
        with self.budgets.reserve(length) as reservation:
            try:
                async with self.drain.bound():
                    raw = await read_body(unless_slow(request.stream()), bound, reservation, length)
            except ClientException as exc:
                raise ClientClosed("The client went away before its request was complete") from exc
            content_type = request.headers.get("content-type", "")
            if forms and is_form(content_type):
                yield await decode_form(raw, content_type)
            else:
                yield await decode_json(raw, self.settings.max_image_bytes)


FrontDependency = NamedDependency[Front]
"""How a handler asks for the front, by the name ``front``."""


async def unless_slow(
    stream: AsyncIterator[bytes], idle: float = BODY_IDLE, rate: float = BODY_RATE
) -> AsyncIterator[bytes]:
    """The chunks of ``stream``, as long as they keep coming: any within ``idle`` seconds, and ``rate`` after those.

    Raises:
        ClientClosed: the next one took too long.
    """
    now = asyncio.get_running_loop().time
    began, arrived = now(), 0
    while True:
        try:
            async with asyncio.timeout_at(min(now(), began + arrived / rate) + idle):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            raise ClientClosed(
                f"The body came too slowly, {arrived} bytes in {now() - began:.0f} s: send the request again"
            ) from exc
        arrived += len(chunk)
        yield chunk


def _bearer(request: AnyRequest) -> str | None:
    headers = request.headers
    return bearer_from_headers(headers.get("authorization"), headers.get("x-auth-key"))


def content_length(request: AnyRequest) -> int | None:
    value = request.headers.get("content-length", "")
    return int(value) if value.isdecimal() else None


def idempotency_key(request: AnyRequest) -> str | None:
    """The ``Idempotency-Key`` header.

    Raises:
        InvalidRequest: it is empty or longer than 255 characters.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY_LENGTH:
        raise InvalidRequest("idempotency_key", f"'Idempotency-Key' must have 1 to {MAX_KEY_LENGTH} characters")
    return key


def preferred_wait(request: AnyRequest) -> float:
    """Seconds of ``Prefer: wait=N`` (RFC 7240); 0 without it."""
    found = _WAIT.search(_QUOTED.sub('""', request.headers.get("prefer", "")))
    return float(found[1]) if found else 0.0

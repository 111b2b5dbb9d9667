"""One call over HTTP: a body goes out, a whole answer comes back. Nothing is tried again here."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import httpx
import msgspec

from img2img import tracing
from img2img.schema import MODEL
from img2img.settings import LOOPBACK
from worker.engines.cloudflare.accounts import Account

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 120.0
IDLE_SECONDS: Final = 15.0
"""How long a connection is kept for the next call: well below the time after which servers close theirs."""
MAX_ANSWER: Final = 32 * 1024 * 1024
"""Bytes; a picture of 2048x2048 is 12 MiB before compression, and a third more in base64."""

UNSENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ProxyError,
    httpx.WriteError,
    httpx.WriteTimeout,
)
"""What httpx raises before the last byte of a call is out: nobody begins with half a body."""

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a body that is no JSON, or is nested too deeply."""


class Answer(msgspec.Struct, frozen=True):
    """What the upstream said; the names of ``headers`` are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def request_id(self) -> str:
        """The upstream's own name for the call, "" if it gave none."""
        return self.headers.get("cf-ai-req-id") or self.headers.get("cf-ray") or ""


class NeverSent(Exception):
    """The upstream did not get the whole call, so that it cannot have begun with it."""


class NoAnswer(Exception):
    """The call was sent and its answer did not come, or not whole: the upstream may have made the picture."""


class Exchange:
    """The connections to an upstream at ``base_url``, one for each call under way. Open it as a context manager.

    HTTP/1.1, one call a connection: when a call is given up its connection is closed, and the upstream knows at once.
    """

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=base_url,
            # Not limited here: httpcore counts a connection for ever whose call was cancelled just as it was made.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS),
            verify=httpx.create_ssl_context(),  # SSL_CERT_FILE counts for a server on this machine, too
            # A proxy in the environment is for the world outside, not for a server on this machine.
            trust_env=urlsplit(base_url).hostname not in LOOPBACK,
            headers={"accept": "image/png, application/json", "content-type": "application/json"},
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def call(self, account: Account, body: bytes, seconds: float) -> Answer:
        """Send ``body`` and wait for the whole answer. Cancelling closes the connection.

        ``seconds`` are left until the job's deadline, of which connecting may take half: who has not connected by then
        has sent nothing, and that should show. The deadline itself is the caller's to keep.

        The call has a span of its own, which the upstream is told of.

        Raises:
            NeverSent, NoAnswer: which of the two decides whether a repetition may be billed twice.
        """
        if seconds <= 0:
            raise NeverSent("the deadline has passed")
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=min(seconds / 2, CONNECT_SECONDS))
        path = f"/accounts/{account.id}/ai/run/{MODEL}"
        try:
            # httpx's own limits are for one read each.
            with tracing.call_span(f"{self._base_url}{path}") as (span, headers):
                headers["authorization"] = account.authorization
                async with (
                    asyncio.timeout(ANSWER_SECONDS),
                    self._client.stream("POST", path, content=body, headers=headers, timeout=timeout) as response,
                ):
                    answer = Answer(response.status_code, dict(response.headers), await _read(response))
                tracing.answered(span, answer.status, answer.request_id)
                return answer
        except UNSENT as exc:
            raise NeverSent(_words(exc)) from exc
        except (httpx.HTTPError, TimeoutError) as exc:
            raise NoAnswer(_words(exc)) from exc


async def _read(response: httpx.Response) -> bytes:
    """The body, up to the limit: what is longer is cut, and no picture then."""
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_ANSWER:
            break
    return bytes(data)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""How clients talk to one gateway, over REST and gRPC alike; what may be tried again is one error of its own."""

import hashlib
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import httpx

from img2img.client import AsyncClient, ClientError
from tests.calls import bearer, key_of, run_path
from tests.chaos.orders import Order

TRY_AGAIN_STATUS: Final = (429, 503)
TRY_AGAIN_CODES: Final = ("unavailable", "cancelled", "deadline_exceeded", "too_many_bytes_in_flight", "wait_timeout")
JOB_ENDS: Final = ("canceled", "quarantined")
"""How the job of a synchronous call may end without a picture: nobody waited for a while, or it met two deaths."""
TIMEOUT: Final = httpx.Timeout(15, connect=3)
WATCH_TIMEOUT: Final = httpx.Timeout(40, connect=3)
"""A stream says something every fifteen seconds."""
CALL_TIMEOUT: Final = httpx.Timeout(70, connect=3)
"""A synchronous call is answered within a minute."""


class TryAgain(Exception):
    """No answer, or one that asks to try again."""


class Refusal(Exception):
    """An answer that the service must not give."""


class Ended(Exception):
    """The job of a synchronous call ended without a picture; the text is its error's code."""


class Caller(Protocol):
    """One account's way to one gateway. Every method raises ``TryAgain`` or ``Refusal``."""

    async def generate(self, order: Order, tries: int) -> tuple[str, str]:
        """Wait for the picture after ``tries`` tries that failed: the job's id, and the SHA-256 of the file.

        Raises:
            Ended: there is none.
        """

    async def create(self, order: Order) -> str:
        """The job's id."""

    async def cancel(self, job_id: str) -> str:
        """The job's state after the cancel."""

    def watch(self, job_id: str, after: int) -> AsyncIterator[tuple[int, str]]:
        """Number and type of each event after ``after``, until the stream ends."""

    async def close(self) -> None: ...


class RestCaller:
    def __init__(self, url: str, account: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False, headers=bearer(account))

    async def generate(self, order: Order, tries: int) -> tuple[str, str]:
        body = {"prompt": order.prompt, "num_steps": order.steps, "seed": order.number}
        headers = {"x-stainless-retry-count": str(tries)}
        try:
            answer = await self._http.post(run_path(order.account), json=body, headers=headers, timeout=CALL_TIMEOUT)
        except httpx.TransportError as exc:
            raise TryAgain(repr(exc)) from exc
        code = answer.headers.get("img2img-error")
        if code in JOB_ENDS:
            raise Ended(code)
        if code in TRY_AGAIN_CODES:
            raise TryAgain(answer.text)
        _check(answer)
        return answer.headers["img2img-job-id"], hashlib.sha256(answer.content).hexdigest()

    async def create(self, order: Order) -> str:
        fields: dict[str, Any] = {**order.fields()}
        options = fields.pop("options")
        fields["options"] = {"priority": options.priority, "previews": options.previews}
        if options.deadline_seconds is not None:
            fields["options"]["deadline_seconds"] = options.deadline_seconds
        if image := fields.pop("image", None):
            fields["image_b64"] = b64encode(image).decode()
        headers = {"idempotency-key": fields.pop("idempotency_key")}
        return str((await self._post("/v1/jobs", json=fields, headers=headers))["id"])

    async def cancel(self, job_id: str) -> str:
        return str((await self._post(f"/v1/jobs/{job_id}/cancel"))["state"])

    async def watch(self, job_id: str, after: int) -> AsyncIterator[tuple[int, str]]:
        headers = {"last-event-id": str(after)} if after else {}
        path = f"/v1/jobs/{job_id}/events"
        try:
            async with self._http.stream("GET", path, headers=headers, timeout=WATCH_TIMEOUT) as answer:
                if not answer.is_success:
                    await answer.aread()
                _check(answer)
                fields: dict[str, str] = {}
                async for line in answer.aiter_lines():
                    name, _, value = line.partition(": ")
                    if line:
                        fields[name] = value
                    elif "id" in fields:
                        yield int(fields["id"]), fields["event"]
                        fields = {}
        except httpx.TransportError as exc:
            raise TryAgain(repr(exc)) from exc

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = await self._http.post(path, **options)
        except httpx.TransportError as exc:
            raise TryAgain(repr(exc)) from exc
        _check(answer)
        return dict(answer.json())


class GrpcCaller:
    def __init__(self, address: str, account: str) -> None:
        self._client = AsyncClient(address, key=key_of(account))

    async def generate(self, order: Order, tries: int) -> tuple[str, str]:
        try:
            picture = await self._client.generate(**order.fields())
        except ClientError as exc:
            raise Ended(exc.code) if exc.code in JOB_ENDS else _translated(exc) from exc
        return picture.job.id, hashlib.sha256(picture.data).hexdigest()

    async def create(self, order: Order) -> str:
        try:
            return (await self._client.create(**order.fields())).id
        except ClientError as exc:
            raise _translated(exc) from exc

    async def cancel(self, job_id: str) -> str:
        try:
            return (await self._client.cancel(job_id)).state.value
        except ClientError as exc:
            raise _translated(exc) from exc

    async def watch(self, job_id: str, after: int) -> AsyncIterator[tuple[int, str]]:
        try:
            async for event in self._client.watch(job_id, after=after):
                yield event.sequence, event.type
        except ClientError as exc:
            raise _translated(exc) from exc

    async def close(self) -> None:
        await self._client.close()


def _check(answer: httpx.Response) -> None:
    if answer.status_code in TRY_AGAIN_STATUS:
        raise TryAgain(answer.text)
    if not answer.is_success:
        raise Refusal(f"{answer.status_code}: {answer.text}")


def _translated(error: ClientError) -> Exception:
    text = f"{error.code}: {error}"
    return TryAgain(text) if error.code in TRY_AGAIN_CODES else Refusal(text)

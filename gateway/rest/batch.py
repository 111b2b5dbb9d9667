"""Cloudflare's batch form: submit ``{"requests": […]}`` with ``?queueRequest=true``, poll with its id."""

import base64
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec
from litestar import Response
from litestar.response import Stream

from gateway.rest.context import Front
from gateway.rest.envelope import REQUEST_ID, error_message, success
from gateway.service import Order
from img2img.errors import Img2ImgError, InvalidRequest, RequestTooLarge, error_of
from img2img.jobs import Job, JobState
from img2img.schema import MODEL

MAX_REQUESTS: Final = 100
MAX_BYTES: Final = 10 * 1024 * 1024
"""Cloudflare's own bound on a batch."""
REFERENCE: Final = "external_reference"


def is_poll(body: object) -> bool:
    """A body with a ``request_id`` and no prompt asks for a batch, with or without the query."""
    return isinstance(body, dict) and isinstance(body.get("request_id"), str) and "prompt" not in body


async def submit(front: Front, account: str, body: object, model: str | None) -> dict[str, Any]:
    """Queue every request of the batch, or none; ``model`` is their ``options.model``.

    Raises:
        InvalidRequest: names the request, as ``/requests/3``, and its field.
    """
    requests = body.get("requests") if isinstance(body, dict) else None
    if not isinstance(requests, list) or not requests:
        raise InvalidRequest("requests", "'/requests' must be an array of at least one request")
    if len(requests) > MAX_REQUESTS:
        raise RequestTooLarge(f"A batch may have {MAX_REQUESTS} requests: split it")
    options = {"model": model}
    orders = [
        Order(front_end="cloudflare-batch", account=account, body=request, options=options) for request in requests
    ]
    references = [request.get(REFERENCE) if isinstance(request, dict) else None for request in requests]
    batch_id = await front.service.create_batch(account, orders, references)
    return {"status": "queued", "request_id": batch_id, "model": model or MODEL}


async def poll(front: Front, account: str, body: Any, request_id: str) -> Response[Any]:
    """The batch's state; with every picture and error once all its jobs have ended.

    Raises:
        JobNotFound: no such batch on this account.
    """
    batch_id = body["request_id"]
    jobs, references = await front.service.get_batch(account, batch_id)
    if not all(job.is_terminal for job in jobs):
        started = any(job.state != JobState.QUEUED for job in jobs)
        model = jobs[0].spec.options.model or MODEL
        state = {"status": "running" if started else "queued", "request_id": batch_id, "model": model}
        return success(state, request_id)
    pieces = _pieces(front, jobs, references, request_id)
    # As a header: a Litestar stream takes the route's media type before its own.
    return Stream(pieces, headers={REQUEST_ID: request_id, "content-type": "application/json"})


async def _pieces(
    front: Front, jobs: Sequence[Job], references: Sequence[object], request_id: str
) -> AsyncIterator[bytes]:
    """The envelope in pieces: a hundred pictures are never in memory together."""
    yield b'{"result":{"responses":['
    for index, (job, reference) in enumerate(zip(jobs, references, strict=True)):
        response = msgspec.json.encode(await _response(front, index, job, reference, request_id))
        yield b"," + response if index else response
    yield b'],"usage":{}},"success":true,"errors":[],"messages":[]}'


async def _response(front: Front, index: int, job: Job, reference: Any, request_id: str) -> dict[str, Any]:
    base = {"id": index, REFERENCE: reference}
    assert job.outcome is not None
    try:
        if job.outcome.error is not None:
            raise error_of(job.outcome.error.code, job.outcome.error.message)
        picture = await front.service.picture(job.id, job.outcome)
    except Img2ImgError as exc:
        return base | {"result": None, "success": False, "errors": [error_message(exc, request_id)]}
    return base | {"result": {"image": base64.b64encode(picture.data).decode()}, "success": True}

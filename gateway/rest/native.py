"""The native jobs API under ``/v1``."""

import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
import structlog
from litestar import Controller, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromQuery, PathParameter, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from gateway.rest.context import AnyRequest, Front, FrontDependency, idempotency_key, preferred_wait
from gateway.rest.disconnect import unless_gone
from gateway.rest.openapi import CreateJobOperation, ImageOperation, WatchOperation, problems
from gateway.rest.problems import on_img2img_error, on_unexpected
from gateway.rest.views import JobList, JobView, event_view, job_view
from gateway.service import Order, Picture
from img2img.errors import Img2ImgError, InvalidRequest, JobNotFound, Unavailable
from img2img.jobs import JOB_ID, JobState
from img2img.queue_types import ServiceStats

MAX_PAGE: Final = 100
JOB_HEADER: Final = "img2img-job-id"
CLOUDFLARE_BUSY: Final = "rejectIfBusy"
MAX_EVENT: Final = 2**63 - 1
"""The server's streams count no further; asking beyond it would be an error of its own."""
EVENT_DIGITS: Final = 19
log = structlog.get_logger(__name__)

Wait = Annotated[float, QueryParameter(ge=0, description="Wait up to this many seconds for the job to end.")]
JobId = Annotated[str, PathParameter(description="The job's id.")]


class JobsController(Controller):
    path = "/v1"
    tags = ["jobs"]
    exception_handlers = {
        Img2ImgError: on_img2img_error,
        Exception: on_unexpected,
    }

    @post(
        "/jobs",
        operation_class=CreateJobOperation,
        status_code=202,
        responses={
            200: ResponseSpec(JobView, description="The job, which has ended already"),
            **problems(400, 401, 403, 404, 409, 413, 429, 503),
        },
    )
    async def create(self, request: AnyRequest, front: FrontDependency) -> Response[JobView]:
        """Queue a job.

        JSON (the model's flat fields plus `options`) or `multipart/form-data` with files. `Idempotency-Key`
        makes a retry return the first job; `Prefer: wait=N` waits up to N seconds; `Deadline` is the number of
        seconds, or the RFC 3339 time, until which the job must be done.
        """
        account = front.authenticate(request)
        key, deadline = idempotency_key(request), _deadline(request, front.settings.max_job_age)
        async with front.body(request, forms=True) as body:
            options = _options(body)
            order = Order(
                front_end="rest",
                account=account,
                body=body,
                options=options,
                deadline=deadline,
                idempotency_key=key,
            )
            submitted = await front.service.create(order)
        wait = preferred_wait(request)
        job = await unless_gone(request, front.service.get(account, submitted.id, wait))
        headers = {"location": f"/v1/jobs/{job.id}", JOB_HEADER: job.id}
        if wait:
            headers["preference-applied"] = f"wait={min(wait, front.settings.max_wait):g}"
        # A new job that nobody waits for is 202, even if a fast worker has ended it by now.
        answered = job.is_terminal and (wait > 0 or not submitted.created)
        return Response(job_view(job), status_code=200 if answered else 202, headers=headers)

    @get("/jobs", responses=problems(400, 401, 503))
    async def list_jobs(
        self,
        request: AnyRequest,
        front: FrontDependency,
        only: Annotated[JobState | None, QueryParameter(name="state", description="Only jobs in this state.")] = None,
        cursor: FromQuery[str | None] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = 20,
    ) -> JobList:
        """List the account's jobs, newest first."""
        account = front.authenticate(request)
        if cursor is not None and JOB_ID.fullmatch(cursor) is None:
            raise InvalidRequest("cursor", "'cursor' must be the 'next' of an earlier page")
        page = await front.service.list_jobs(account, state=only, cursor=cursor, limit=limit)
        return JobList([job_view(job) for job in page.jobs], page.next)

    @get("/jobs/{job_id:str}", responses=problems(400, 401, 404, 503))
    async def get_job(self, request: AnyRequest, front: FrontDependency, job_id: JobId, wait: Wait = 0.0) -> JobView:
        """Show a job; with `wait`, as soon as it has ended, or as it stands after that many seconds."""
        account = front.authenticate(request)
        return job_view(await unless_gone(request, front.service.get(account, job_id, wait)))

    @get(
        "/jobs/{job_id:str}/events",
        operation_class=WatchOperation,
        media_type="text/event-stream",
        responses=problems(400, 401, 404, 503),
    )
    async def watch(
        self,
        request: AnyRequest,
        front: FrontDependency,
        job_id: JobId,
        after: Annotated[
            int, QueryParameter(ge=0, le=MAX_EVENT, description="Sequence number of the last event seen.")
        ] = 0,
    ) -> ServerSentEvent:
        """Stream the job's events until it has ended; `Last-Event-ID` resumes without a gap."""
        account = front.authenticate(request)
        last_seen = _last_event(request)
        await front.service.get(account, job_id)
        return ServerSentEvent(_messages(front, account, job_id, after if last_seen is None else last_seen))

    @get(
        "/jobs/{job_id:str}/image",
        operation_class=ImageOperation,
        media_type="image/png",
        responses=problems(400, 401, 404, 409, 410, 503),
    )
    async def image(self, request: AnyRequest, front: FrontDependency, job_id: JobId) -> Response[bytes]:
        """The finished picture."""
        account = front.authenticate(request)
        return picture_response(await front.service.result(account, job_id))

    @post("/jobs/{job_id:str}/cancel", status_code=200, responses=problems(400, 401, 404, 503))
    async def cancel(self, request: AnyRequest, front: FrontDependency, job_id: JobId) -> JobView:
        """Cancel a job, in any state and as often as you like."""
        account = front.authenticate(request)
        return job_view(await front.service.cancel(account, job_id))

    @post("/jobs/{job_id:str}/replay", status_code=200, responses=problems(400, 401, 404, 409, 429, 503))
    async def replay(self, request: AnyRequest, front: FrontDependency, job_id: JobId) -> JobView:
        """Run a failed, canceled or expired job again under its id; one that is queued or runs goes on as it is."""
        account = front.authenticate(request)
        return job_view(await front.service.replay(account, job_id))

    @get("/queue", responses=problems(401, 503))
    async def queue(self, request: AnyRequest, front: FrontDependency) -> ServiceStats:
        """How many jobs wait and run, and which workers are alive."""
        front.authenticate(request)
        return await front.service.stats()


async def _messages(front: Front, account: str, job_id: str, after: int) -> AsyncIterator[ServerSentEventMessage]:
    """The stream's messages. Once it has begun an error can only end it: the client connects again and is told."""
    watched = front.service.watch(account, job_id, after)
    try:
        while True:
            async with front.drain.bound():
                events = await anext(watched, None)
            if events is None:
                return
            if not events:
                yield ServerSentEventMessage(data=None, comment="keep-alive")
            for event in events:
                data = msgspec.json.encode(event_view(event)).decode()
                yield ServerSentEventMessage(data=data, event=event.type, id=event.seq)
    except (Unavailable, JobNotFound) as exc:
        log.info("event_stream_ends_early", job=job_id, code=exc.code)


def _options(body: object) -> object:
    """The body's ``options``; Cloudflare's one option is legal here, too, under its own name."""
    options = body.get("options") if isinstance(body, dict) else None
    if isinstance(options, dict) and CLOUDFLARE_BUSY in options:
        options = {"reject_if_busy": options[CLOUDFLARE_BUSY]} | options
        del options[CLOUDFLARE_BUSY]
    return options


def _last_event(request: AnyRequest) -> int | None:
    """The ``Last-Event-ID`` header, which a browser sends when it connects again.

    Raises:
        InvalidRequest: it is not the number of an event.
    """
    value = request.headers.get("last-event-id", "")
    if not value:
        return None
    if not (value.isascii() and value.isdecimal()) or len(value) > EVENT_DIGITS or int(value) > MAX_EVENT:
        raise InvalidRequest("last-event-id", "'Last-Event-ID' must be the number of an event")
    return int(value)


def picture_response(picture: Picture, headers: dict[str, str] | None = None) -> Response[bytes]:
    """The encoded file as it is, private to its caller."""
    base: dict[str, Any] = {JOB_HEADER: picture.job_id, "cache-control": "private"}
    return Response(picture.data, media_type=picture.result.media_type, headers=base | (headers or {}))


def _deadline(request: AnyRequest, limit: float) -> float | None:
    """The ``Deadline`` header in seconds from now, at most ``limit``.

    Raises:
        InvalidRequest: neither a number of seconds nor an RFC 3339 time, in the past, or too far away.
    """
    value = request.headers.get("deadline")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            at = datetime.min
        if at.tzinfo is None:  # whose clock it means nobody can tell
            raise InvalidRequest(
                "deadline", "'Deadline' must be seconds, or a time like 2030-01-31T12:00:00Z"
            ) from None
        seconds = at.timestamp() - time.time()
    if not 0 < seconds <= limit:
        raise InvalidRequest("deadline", f"'Deadline' must lie in the future, and at most {limit:g} seconds away")
    return seconds

"""The eight methods of ``Img2ImgService``: each maps its message to a call of the job service."""

import asyncio
import time
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final

import grpc
import grpc.aio

from gateway.drain import Drain
from gateway.rpc.errors import abort, to_status
from gateway.rpc.interceptor import caller, share
from gateway.rpc.messages import (
    STATE_NUMBERS,
    event_message,
    job_message,
    option_fields,
    request_fields,
    result_message,
)
from gateway.rpc.tracing import is_past_deadline
from gateway.service import JobService, Order
from img2img.errors import InvalidRequest, Unavailable, error_of
from img2img.jobs import JOB_ID, Failure, JobState, Outcome
from img2img.settings import Settings
from img2img.v1 import img2img_pb2 as pb
from img2img.v1.img2img_pb2_grpc import Img2ImgServiceServicer

INLINE_BYTES: Final = 3_500_000
"""Clients refuse messages above 4 MiB unless told otherwise; the job itself needs some room."""
CHUNK_BYTES: Final = 512 * 1024
"""Measured on loopback: 64 KiB 0.5 GB/s, 256 KiB 0.9, 512 KiB and 1 MiB 1.2, 2 MiB 0.4."""
END_MARGIN: Final = 5.0
"""Seconds that a job may take to be ended after its deadline."""
DEFAULT_PAGE: Final = 20
MAX_PAGE: Final = 100
MAX_KEY_LENGTH: Final = 255

Context = grpc.aio.ServicerContext[Any, Any]


class Img2ImgServicer(Img2ImgServiceServicer):
    """Raises the service's errors as they are: :class:`CallInterceptor` answers with their status."""

    def __init__(self, service: JobService, settings: Settings, drain: Drain) -> None:
        self._service = service
        self._drain = drain
        self._settings = settings

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        left: float | None = context.time_remaining()
        order = [_order(request, left)]
        del request
        job_id, outcome = await self._attend(order.pop(), context)
        if outcome.result is None:
            failure = outcome.error or Failure("internal", f"The job {outcome.state} without saying why")
            await abort(context, to_status(error_of(failure.code, failure.message), job_id=job_id))
        job = await self._service.get(caller.get(), job_id)
        image = b""
        if outcome.result.bytes <= INLINE_BYTES:
            image = (await self._service.picture(job_id, outcome)).data
        return pb.GenerateResponse(job=job_message(job), image=image)

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> pb.CreateJobResponse:  # noqa: N802
        submitted = await self._service.create(_order(request, None))
        job = await self._service.get(caller.get(), submitted.id)
        return pb.CreateJobResponse(job=job_message(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:  # noqa: N802
        if not request.wait_seconds >= 0:  # not `< 0`: NaN is refused, too
            raise InvalidRequest("wait_seconds", "'/wait_seconds' must be >= 0")
        job_id, wait = request.id, request.wait_seconds
        del request  # the wait may be long, and a message may be padded
        share.get().release()
        job = await self._service.get(caller.get(), job_id, wait)
        return pb.GetJobResponse(job=job_message(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:  # noqa: N802
        if not 0 <= request.page_size <= MAX_PAGE:
            raise InvalidRequest("page_size", f"'/page_size' must be between 1 and {MAX_PAGE}")
        if request.page_token and not JOB_ID.fullmatch(request.page_token):
            raise InvalidRequest("page_token", "'/page_token' must be the next_page_token of an earlier answer")
        page = await self._service.list_jobs(
            caller.get(),
            state=_state(request.state),
            cursor=request.page_token or None,
            limit=request.page_size or DEFAULT_PAGE,
        )
        return pb.ListJobsResponse(jobs=map(job_message, page.jobs), next_page_token=page.next or "")

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> None:  # noqa: N802
        if request.after < 0:
            raise InvalidRequest("after", "'/after' must be >= 0: the sequence number of the last event seen")
        job_id, after = request.id, request.after
        del request  # the wait may be long, and a message may be padded
        share.get().release()
        seen, attempt, ended = after, 0, False
        # From the beginning even for a caller who resumes: only the log says in which attempt an event was.
        watched = self._service.watch(caller.get(), job_id)
        async with aclosing(watched) as batches:  # type: ignore[type-var]
            async for events in batches:
                for event in events:
                    number = event.data.get("attempt")
                    attempt = number if isinstance(number, int) else attempt
                    if event.seq > after:
                        await context.write(event_message(event, attempt))
                    seen, ended = event.seq, event.is_terminal
        if not ended:
            raise Unavailable(f"This gateway is shutting down: watch again with after={max(seen, after)}")

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:  # noqa: N802
        job = await self._service.cancel(caller.get(), request.id)
        return pb.CancelJobResponse(job=job_message(job))

    async def ReplayJob(self, request: pb.ReplayJobRequest, context: Context) -> pb.ReplayJobResponse:  # noqa: N802
        job = await self._service.replay(caller.get(), request.id)
        return pb.ReplayJobResponse(job=job_message(job))

    async def GetResult(self, request: pb.GetResultRequest, context: Context) -> None:  # noqa: N802
        picture = await self._service.result(caller.get(), request.id)
        await context.write(pb.GetResultResponse(result=result_message(picture.result)))
        for start in range(0, len(picture.data), CHUNK_BYTES):
            await context.write(pb.GetResultResponse(chunk=picture.data[start : start + CHUNK_BYTES]))

    async def _attend(self, order: Order, context: Context) -> tuple[str, Outcome]:
        """Create the job and wait for its end; a caller that goes away leaves it, which ends it at once.

        A caller whose deadline comes does not leave: the job has the same deadline and ends ``expired`` a
        moment later, where leaving would make it ``canceled``.
        """
        timeout = self._settings.max_job_age if order.deadline is None else order.deadline
        _check_start(order.options, timeout)
        waiting = asyncio.create_task(self._wait(order, timeout + END_MARGIN), name="generate")
        del order
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not is_past_deadline(context):
                waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            raise

    async def _wait(self, order: Order, timeout: float) -> tuple[str, Outcome]:
        async with self._service.attend(order, grace=0) as attendance:
            del order  # the wait may be long, and the picture is stored
            share.get().release()
            async with self._drain.bound(attendance.job_id):
                return attendance.job_id, await attendance.outcome(timeout)


def _order(request: pb.CreateJobRequest | pb.GenerateRequest, deadline: float | None) -> Order:
    key = request.idempotency_key
    if len(key) > MAX_KEY_LENGTH:
        raise InvalidRequest("idempotency_key", f"'/idempotency_key' must have 1 to {MAX_KEY_LENGTH} characters")
    return Order(
        front_end="grpc",
        account=caller.get(),
        body=request_fields(request.request),
        options=option_fields(request.options),
        deadline=deadline,
        idempotency_key=key or None,
    )


def _check_start(options: Any, timeout: float) -> None:
    """Refuse to wait for a job that begins after its caller has gone; ``timeout`` is in seconds."""
    start = options.get("not_before")
    if isinstance(start, datetime) and start.timestamp() - time.time() >= timeout:
        raise InvalidRequest(
            "options.not_before",
            "'/options/not_before' must lie before the call's deadline: allow more time, or use CreateJob",
        )


def _state(number: int) -> JobState | None:
    if number == pb.JOB_STATE_UNSPECIFIED:
        return None
    if number not in STATE_NUMBERS:
        raise InvalidRequest("state", f"'/state' has no value {number}: see JobState in img2img.proto")
    return STATE_NUMBERS[number]

"""The job service on a real server: what becomes of inputs and jobs when a call is cut off or fails half way."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from gateway.routing import open_router
from gateway.service import JobService, Order
from gateway.tenants import Tenants
from img2img.blobs import RedisBlobs
from img2img.errors import IdempotencyConflict, JobNotFound, NoCapacity, Unavailable
from img2img.events import EventHub
from img2img.jobs import StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Submitted
from img2img.settings import Settings
from img2img.wiring import Parts, open_parts
from tests.calls import picture


class ForgetfulQueue(JobQueue):
    """Loses the answers to the submissions and cancels whose numbers it is told, after the server has acted."""

    lost: frozenset[int] = frozenset()
    lost_cancels: frozenset[int] = frozenset()
    submits = 0
    cancels = 0

    async def submit(self, *arguments: Any, **more: Any) -> Submitted:
        self.submits += 1
        submitted = await super().submit(*arguments, **more)
        if self.submits in self.lost:
            raise Unavailable("the answer was lost")
        return submitted

    async def cancel(self, job_id: str, reason: StopReason) -> None:
        self.cancels += 1
        if self.cancels in self.lost_cancels:
            raise Unavailable("the cancel was lost")
        await super().cancel(job_id, reason)


class SlowBlobs(RedisBlobs):
    """Says when a blob is there, and takes its time to return."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stored, self.go_on = asyncio.Event(), asyncio.Event()

    async def put(self, *arguments: Any) -> None:
        await super().put(*arguments)
        self.stored.set()
        await self.go_on.wait()


@pytest.fixture
async def parts(valkey_url: str) -> AsyncIterator[Parts]:
    async with open_parts(Settings(redis_url=valkey_url, max_job_age=100.0, job_retention=50.0)) as parts:
        await parts.queue.redis.flushall()
        yield parts


@pytest.fixture
async def hub(parts: Parts) -> AsyncIterator[EventHub]:
    async with EventHub(parts.queue) as hub:
        yield hub


@pytest.fixture
def queue(parts: Parts) -> ForgetfulQueue:
    return ForgetfulQueue(parts.queue.redis, parts.settings.queue)


@pytest.fixture
def service(parts: Parts, hub: EventHub, queue: ForgetfulQueue) -> JobService:
    return JobService(
        msgspec.structs.replace(parts, queue=queue), hub, Tenants.open_local(), open_router(parts.settings)
    )


def order(**body: Any) -> Order:
    options = {"reject_if_busy": True} if body.pop("busy", False) else None
    key = body.pop("key", None)
    whole = {"prompt": "x", "image": picture()} | body
    return Order(front_end="test", account="acme", body=whole, options=options, idempotency_key=key)


async def input_blobs(parts: Parts) -> int:
    return len(await parts.queue.redis.keys("*input:*"))


async def test_a_lost_answer_keeps_the_input(parts: Parts, queue: ForgetfulQueue, service: JobService) -> None:
    """The job may be there: a retry with the same key joins it, and its picture can still be read."""
    queue.lost = frozenset({1})
    with pytest.raises(Unavailable):
        await service.create(order(key="k"))
    submitted = await service.create(order(key="k"))
    assert not submitted.created
    inputs = (await service.get("acme", submitted.id)).spec.inputs
    assert inputs is not None
    assert await parts.blobs.get(inputs) is not None
    assert await input_blobs(parts) == 1  # the retry's own copy is gone


async def test_a_refused_request_leaves_no_input(parts: Parts, service: JobService) -> None:
    """Where the server has certainly not made a job, nothing is kept for it."""
    with pytest.raises(NoCapacity):
        await service.create(order(busy=True))
    assert await input_blobs(parts) == 0
    await service.create(order(key="k"))
    with pytest.raises(IdempotencyConflict):
        await service.create(order(key="k", prompt="another"))
    assert await input_blobs(parts) == 1


async def test_a_call_cut_off_before_its_submit_leaves_no_input(parts: Parts, hub: EventHub) -> None:
    """A picture that was on its way when the caller went is deleted as soon as it is there."""
    blobs = SlowBlobs(parts.queue.redis, parts.queue.prefix)
    service = JobService(
        msgspec.structs.replace(parts, blobs=blobs), hub, Tenants.open_local(), open_router(parts.settings)
    )
    call = asyncio.create_task(service.create(order()))
    await blobs.stored.wait()
    assert await input_blobs(parts) == 1
    call.cancel()
    blobs.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await input_blobs(parts) == 0
    assert not (await service.list_jobs("acme")).jobs


async def test_a_failed_batch_takes_back_what_it_can(queue: ForgetfulQueue, service: JobService) -> None:
    """A submit whose answer was lost counts as made, and a cancel that fails keeps no other job alive."""
    queue.lost, queue.lost_cancels = frozenset({3}), frozenset({1})
    with pytest.raises(Unavailable, match="answer was lost"):
        await service.create_batch("acme", [order() for _ in range(4)], [None] * 4)
    jobs = (await service.list_jobs("acme")).jobs
    assert [job.state for job in reversed(jobs)] == ["queued", "canceled", "canceled"]


async def test_a_refused_batch_has_nothing_to_take_back(service: JobService) -> None:
    """And nothing to complain of in the log."""
    with capture_logs() as logs, pytest.raises(NoCapacity):
        await service.create_batch("acme", [order(), order(busy=True)], [None] * 2)
    assert [job.state for job in (await service.list_jobs("acme")).jobs] == ["canceled"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == []


async def test_a_batch_outlives_its_jobs(parts: Parts, service: JobService) -> None:
    """It can be polled for as long as any of its jobs may be read."""
    batch_id = await service.create_batch("acme", [order()], [None])
    [batch_key] = await parts.queue.redis.keys(f"*{batch_id}")
    [job], _ = await service.get_batch("acme", batch_id)
    [job_key] = await parts.queue.redis.keys(f"*:job:{job.id}")
    left = await parts.queue.redis.pttl(batch_key)
    assert 0 < await parts.queue.redis.pttl(job_key) <= left + 1000
    with pytest.raises(JobNotFound):
        await service.get_batch("other", batch_id)

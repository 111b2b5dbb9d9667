"""What a worker tells its engine of a job, beside what to draw."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from img2img.jobs import JobState, OnLost, Outcome, StopReason
from img2img.queue_types import Candidate
from img2img.settings import Settings
from img2img.spending import Spending
from img2img.wiring import Parts, open_parts
from tests.days import keep_within_a_day
from tests.queue.calls import claim_one, submit
from worker.attempt import StageClock
from worker.engines.base import Answered, Checkpoint, Output, Pictures, Sent, Task
from worker.engines.fake import FakeEngine
from worker.runner import JobRunner, Lost, Stop


class Recording(FakeEngine):
    """Keeps the tasks that it got."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[Task] = []

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        self.tasks.append(task)
        async for output in super().generate(task, pictures, resume, interrupt):
            yield output


class Calling(FakeEngine):
    """Says that it calls another service, three times, and looks each time at what is on record when it goes on."""

    def __init__(self, parts: Parts, on_lost: OnLost) -> None:
        super().__init__()
        self._parts = parts
        self._on_lost = on_lost
        self.seen: list[bytes | None] = []

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        for word in (Sent(self._on_lost), Answered(), Sent(self._on_lost), Answered(billed=True), Sent(self._on_lost)):
            yield word
            self.seen.append(await self._recorded())
        async for output in super().generate(task, pictures, resume, interrupt):
            yield output

    async def _recorded(self) -> bytes | None:
        queue = self._parts.queue
        (key,) = await queue.redis.keys(f"{queue.prefix}job:*")
        found: bytes | None = await queue.redis.hget(key, "sent")
        return found


@pytest.fixture
async def parts(valkey_url: str) -> AsyncIterator[Parts]:
    async with open_parts(Settings(redis_url=valkey_url)) as parts:
        await parts.queue.redis.flushall()
        yield parts


async def task_of(parts: Parts, **submission: Any) -> Task:
    """The task of a job that was submitted and run."""
    await submit(parts.queue, **submission)
    engine = Recording()
    runner = JobRunner(parts.queue, parts.blobs, engine, parts.settings, "w1")
    decision = await runner.run(await claim_one(parts.queue), Stop(), StageClock(0.0))
    assert isinstance(decision, Outcome)
    assert decision.state == JobState.SUCCEEDED
    return engine.tasks[0]


@pytest.mark.parametrize("reproducible", [False, True])
async def test_whether_the_job_is_reproducible(parts: Parts, reproducible: bool) -> None:
    """As its options say."""
    assert (await task_of(parts, options={"reproducible": reproducible})).reproducible is reproducible


async def test_the_deadline_on_its_own_clock(parts: Parts) -> None:
    """The job's deadline, turned from the server's clock to this process's, which nobody sets."""
    before = time.monotonic()
    task = await task_of(parts, seconds=1000.0)
    after = time.monotonic()

    assert before + 1000.0 - (after - before) <= task.deadline <= after + 1000.0


@pytest.mark.parametrize("on_lost", ["retry", "fail"])
async def test_its_turn_only_when_its_call_is_on_record(parts: Parts, on_lost: OnLost) -> None:
    """And off it, when it says that there is an answer; what was billed stays spent."""
    keep_within_a_day(5.0)
    await submit(parts.queue, pools=[Candidate(parts.queue.name, price=10, tenant_cap=100)])
    engine = Calling(parts, on_lost)
    runner = JobRunner(parts.queue, parts.blobs, engine, parts.settings, "w1")
    await runner.run(await claim_one(parts.queue), Stop(), StageClock(0.0))
    assert engine.seen == [on_lost.encode(), None, on_lost.encode(), None, on_lost.encode()]
    spending = Spending(parts.queue.redis)
    assert (await spending.today_in([parts.queue.name]))[parts.queue.name] == pytest.approx(20e-6)


@pytest.mark.parametrize("why", [StopReason.USER, StopReason.LEASE_LOST])
async def test_no_turn_for_a_call_of_a_job_that_is_to_stop(parts: Parts, why: StopReason) -> None:
    """Canceled, or somebody else's by now: the engine is not asked for more."""
    job_id = await submit(parts.queue)
    claim = await claim_one(parts.queue)
    if why is StopReason.USER:
        await parts.queue.cancel(job_id)
    else:
        await parts.queue.redis.hset(f"{parts.queue.prefix}job:{job_id}", "fence", "1")
    engine = Calling(parts, "retry")
    runner = JobRunner(parts.queue, parts.blobs, engine, parts.settings, "w1")
    decision = await runner.run(claim, Stop(), StageClock(0.0))
    assert engine.seen == []
    if why is StopReason.USER:
        assert isinstance(decision, Outcome)
        assert decision.state == JobState.CANCELED
    else:
        assert isinstance(decision, Lost)

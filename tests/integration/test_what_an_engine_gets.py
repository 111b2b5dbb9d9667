"""What a worker tells its engine of a job, beside what to draw."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from img2img.jobs import JobState, Outcome
from img2img.settings import Settings
from img2img.wiring import Parts, open_parts
from tests.queue.calls import claim_one, submit
from worker.engines.base import Checkpoint, Output, Pictures, Task
from worker.engines.fake import FakeEngine
from worker.runner import JobRunner, Stop


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
    decision = await runner.run(await claim_one(parts.queue), Stop())
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

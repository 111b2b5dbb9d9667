"""What a queue owes, in seconds: measured or guessed, with workers and without."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from img2img.queue import JobQueue
from img2img.queue_types import WorkerInfo
from tests.queue.calls import LEASE, SUCCEEDED, claim_one, submit

GUESS = 0.05
"""Seconds of a step while nothing was measured."""


async def finish_one(queue: JobQueue, seconds: float) -> None:
    await submit(queue)
    claim = await claim_one(queue)
    await asyncio.sleep(seconds)
    await queue.finish(claim, SUCCEEDED)


async def test_an_empty_queue_owes_nothing(queue: JobQueue) -> None:
    stats = await queue.stats()
    assert (stats.seconds, stats.running_seconds) == (0.0, 0.0)


async def test_work_is_guessed_by_its_steps_until_some_was_measured(queue: JobQueue) -> None:
    for steps in (4, 20):
        await submit(queue, fields={"num_steps": steps})
    assert (await queue.stats()).seconds == pytest.approx(24 * GUESS)


async def test_what_was_measured_holds_without_workers(queue: JobQueue) -> None:
    await finish_one(queue, 0.3)
    await queue.sign_off("w1")
    assert (await queue.stats()).workers == ()
    for _ in range(3):
        await submit(queue)
    assert (await queue.stats()).seconds >= 3 * 0.3


async def test_work_that_took_no_time_is_work_all_the_same(queue: JobQueue) -> None:
    """Nobody would start a worker for it otherwise."""
    for _ in range(3):
        await finish_one(queue, 0.0)
    await submit(queue)
    assert (await queue.stats()).seconds >= 0.001


async def test_a_job_that_lost_its_worker_is_owed(queue: JobQueue) -> None:
    """With the mean of what was measured; it waits apart, for a worker of its own."""
    await finish_one(queue, 0.3)
    await submit(queue)
    await claim_one(queue, lease=0.05)
    await asyncio.sleep(0.1)
    await queue.sweep()
    stats = await queue.stats()
    assert (stats.queued, stats.running) == (1, 0)
    assert stats.seconds >= 0.3


async def test_a_job_that_may_not_start_yet_is_not_owed(queue: JobQueue) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    await submit(queue, options={"not_before": later.isoformat()})
    stats = await queue.stats()
    assert (stats.delayed, stats.seconds) == (1, 0.0)


async def test_what_is_left_of_a_running_job_dwindles(queue: JobQueue) -> None:
    """To nothing, however long it takes beyond that."""
    await queue.beat(WorkerInfo("w1", 1, "fake", "fake", "cpu"), [], lease=LEASE, ttl=60)
    await submit(queue, fields={"num_steps": 10})
    claim = await claim_one(queue)
    first = (await queue.stats()).running_seconds
    assert 0 < first <= 10 * GUESS
    await asyncio.sleep(10 * GUESS)
    assert (await queue.stats()).running_seconds == 0.0
    await queue.finish(claim, SUCCEEDED)

"""Previews in a job's log: numbered like any event, and never more than one picture."""

import pytest

from img2img.events import EventHub
from img2img.jobs import Failure, JobEvent, JobState, Outcome, PreviewPicture, Running, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim
from tests.queue.calls import SUCCEEDED, claim_one, submit


def picture(step: int) -> PreviewPicture:
    return PreviewPicture("image/webp", 64, 48, bytes([step]) * 100)


async def show(queue: JobQueue, claim: Claim, *steps: int) -> None:
    for step in steps:
        assert await queue.preview(claim, step, 20, picture(step)) is None


async def log_of(queue: JobQueue, job_id: str) -> list[JobEvent]:
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        return await follower.read()


async def test_only_the_newest_preview_has_its_picture(queue: JobQueue) -> None:
    """The others stay where they are, and say which step they were of."""
    job_id = await submit(queue)
    claim = await claim_one(queue)
    await show(queue, claim, 1, 2)
    await queue.report(claim, Running(executed_by="w1", step=2, steps=20))
    before = await log_of(queue, job_id)
    await show(queue, claim, 3)
    events = await log_of(queue, job_id)
    assert [event.type for event in events] == ["queued", "running", "preview", "preview", "progress", "preview"]
    previews = [event for event in events if event.type == "preview"]
    assert [event.preview for event in previews] == [None, None, picture(3)]
    assert [event.data["step"] for event in previews] == [1, 2, 3]
    assert previews[0].data == {"step": 1, "steps": 20}
    assert [(event.seq, event.at) for event in events[: len(before)]] == [(event.seq, event.at) for event in before]
    assert {event.state for event in previews} == {JobState.RUNNING}


@pytest.mark.parametrize("how", ["finish", "cancel", "interruption", "failure", "death"])
async def test_no_picture_outlives_its_attempt(queue: JobQueue, how: str) -> None:
    job_id = await submit(queue)
    claim = await claim_one(queue)
    await show(queue, claim, 1, 2)
    match how:
        case "finish":
            await queue.finish(claim, SUCCEEDED)
        case "cancel":
            await queue.finish(claim, Outcome(state=JobState.CANCELED))
        case "interruption":
            await queue.release(claim, Failure("interrupted", "x"), "interruptions")
        case "failure":
            await queue.release(claim, Failure("engine_failed", "x"), "failures")
        case "death":
            await queue.redis.zadd(f"{queue.prefix}leases:{queue.name}", {job_id: 1})
            await queue.sweep()
    events = await log_of(queue, job_id)
    assert [event.preview for event in events if event.type == "preview"] == [None, None]
    assert await queue.redis.hget(f"{queue.prefix}job:{job_id}", "preview") is None


async def test_the_next_attempts_previews_leave_the_log_as_it_is(queue: JobQueue) -> None:
    job_id = await submit(queue)
    first = await claim_one(queue)
    await show(queue, first, 1, 2)
    await queue.release(first, Failure("interrupted", "x"), "interruptions")
    second = await claim_one(queue)
    await show(queue, second, 3)
    shown = {event.seq: event.preview for event in await log_of(queue, job_id) if event.type == "preview"}
    assert shown == {3: None, 4: None, 7: picture(3)}


async def test_a_stale_attempt_shows_nothing(queue: JobQueue) -> None:
    job_id = await submit(queue)
    claim = await claim_one(queue)
    await queue.finish(claim, SUCCEEDED)
    before = await log_of(queue, job_id)
    assert await queue.preview(claim, 1, 20, picture(1)) == StopReason.LEASE_LOST
    assert await log_of(queue, job_id) == before


async def test_the_answer_tells_a_job_to_stop(queue: JobQueue) -> None:
    await submit(queue)
    claim = await claim_one(queue)
    await queue.cancel(claim.id)
    assert await queue.preview(claim, 1, 20, picture(1)) == StopReason.USER

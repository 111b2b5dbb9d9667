"""A call that may be billed is on record before it is made, and decides what becomes of a job whose attempt is lost."""

from typing import Final

import pytest
from arq.connections import ArqRedis

from img2img.jobs import Failure, JobState, OnLost, Outcome, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim, Discard
from tests.queue.calls import KEEP, SUCCEEDED, claim_one, submit

FAILED: Final = Failure("upstream_failed", "x")
BILLED: Final = "A call upstream was sent and its answer lost, so that it may have been billed"


async def started(queue: JobQueue) -> Claim:
    await submit(queue)
    return await claim_one(queue)


async def die(queue: JobQueue, claim: Claim) -> list[Discard]:
    """The claim's lease runs out; answers which blobs may go."""
    await queue.redis.zadd(f"{queue.prefix}leases:{queue.name}", {claim.id: 1})
    return (await queue.sweep())[0]


async def recorded(redis: ArqRedis, queue: JobQueue, claim: Claim) -> bytes | None:
    found: bytes | None = await redis.hget(f"{queue.prefix}job:{claim.id}", "sent")
    return found


@pytest.mark.parametrize("on_lost", ["retry", "fail"])
async def test_the_word_is_on_record_until_it_is_taken_back(queue: JobQueue, redis: ArqRedis, on_lost: OnLost) -> None:
    """Saying it twice, because an answer was lost, is saying it once."""
    claim = await started(queue)
    for _ in range(2):
        assert await queue.sent(claim, 1, on_lost) is None
        assert await recorded(redis, queue, claim) == on_lost.encode()
    for _ in range(2):
        assert await queue.sent(claim, 1, None) is None
        assert await recorded(redis, queue, claim) is None


async def test_a_stale_attempt_is_told_to_make_no_call(queue: JobQueue, redis: ArqRedis) -> None:
    """It leaves no word on the record of an attempt that is not its own."""
    stale = await started(queue)
    await die(queue, stale)
    assert await queue.sent(stale, 1, "fail") == StopReason.LEASE_LOST
    fresh = await claim_one(queue)
    assert await queue.sent(stale, 1, "fail") == StopReason.LEASE_LOST
    assert await recorded(redis, queue, fresh) is None


async def test_a_job_that_is_to_stop_makes_no_call(queue: JobQueue) -> None:
    claim = await started(queue)
    await queue.cancel(claim.id)
    assert await queue.sent(claim, 1, "retry") == StopReason.USER


async def test_with_retry_it_runs_again_and_its_history_says_what_may_have_been_billed(
    queue: JobQueue, redis: ArqRedis
) -> None:
    claim = await started(queue)
    await queue.sent(claim, 1, "retry")
    await die(queue, claim)
    job = await queue.get(claim.id)
    assert (job.state, job.crashes) == (JobState.QUEUED, 1)
    assert job.history[-1].error.code == "worker_lost"
    assert job.history[-1].error.message.endswith(BILLED)
    again = await claim_one(queue)
    assert await recorded(redis, queue, again) is None


@pytest.mark.parametrize("ending", ["crash", "failures", "interruptions"])
async def test_with_fail_it_ends_and_can_be_replayed(queue: JobQueue, ending: str) -> None:
    """However the attempt ended; and its input is kept for the replay."""
    await submit(queue)
    claim = await claim_one(queue)
    await queue.redis.hset(f"{queue.prefix}job:{claim.id}", "inputs", "input:x")
    await queue.sent(claim, 1, "fail")
    if ending == "crash":
        (discard,) = await die(queue, claim)
    else:
        await queue.release(claim, FAILED, ending)  # type: ignore[arg-type]
        (discard,), _ = await queue.sweep()
    job = await queue.get(claim.id)
    assert job.state == JobState.FAILED
    assert job.outcome is not None
    assert job.outcome.error == Failure("upstream_unknown", f"{BILLED}: replay the job to run it again")
    assert (discard.key, discard.kept) == ("input:x", KEEP)
    await queue.discarded(discard)
    await queue.replay(claim.id, 60)
    again = await claim_one(queue)
    await queue.release(again, FAILED, "failures")
    assert (await queue.get(claim.id)).state == JobState.QUEUED


async def test_an_answer_without_a_picture_is_a_failure_like_any_other(queue: JobQueue) -> None:
    """The word was taken back: nothing is unknown."""
    claim = await started(queue)
    await queue.sent(claim, 1, "fail")
    await queue.sent(claim, 1, None)
    await queue.release(claim, FAILED, "failures")
    job = await queue.get(claim.id)
    assert (job.state, job.history[-1].error) == (JobState.QUEUED, FAILED)


async def test_a_canceled_job_is_canceled(queue: JobQueue) -> None:
    """Whoever canceled it does not want to know what became of the call."""
    claim = await started(queue)
    await queue.sent(claim, 1, "fail")
    await queue.cancel(claim.id)
    await die(queue, claim)
    assert (await queue.get(claim.id)).state == JobState.CANCELED


async def test_a_job_that_succeeds_needs_no_word_taken_back(queue: JobQueue) -> None:
    """Its record and its input go as they always do."""
    claim = await started(queue)
    await queue.redis.hset(f"{queue.prefix}job:{claim.id}", "inputs", "input:x")
    await queue.sent(claim, 1, "fail")
    await queue.finish(claim, SUCCEEDED)
    assert (await queue.get(claim.id)).state == JobState.SUCCEEDED
    assert [(discard.key, discard.kept) for discard in (await queue.sweep())[0]] == [("input:x", 0)]


async def test_an_engine_that_knows_that_the_answer_is_lost_ends_the_job_the_same_way(queue: JobQueue) -> None:
    """The input is kept, too."""
    claim = await started(queue)
    await queue.redis.hset(f"{queue.prefix}job:{claim.id}", "inputs", "input:x")
    await queue.sent(claim, 1, "fail")
    await queue.finish(claim, Outcome(state=JobState.FAILED, error=Failure("upstream_unknown", "x")))
    assert [(discard.key, discard.kept) for discard in (await queue.sweep())[0]] == [("input:x", KEEP)]

"""Where a job can go on: recorded under the fence, handed out with the next claim, gone when it is of no use."""

import asyncio
from contextlib import suppress
from typing import Final

import pytest
from arq.connections import ArqRedis

from gateway.upkeep import run_upkeep
from img2img.blobs import RedisBlobs
from img2img.jobs import Failure, JobState, Outcome, StopReason, StoredCheckpoint
from img2img.queue import JobQueue
from img2img.queue_types import Claim, Rules
from tests.queue.calls import LEASE, SUCCEEDED, claim_one, submit

INTERRUPTED: Final = Failure("interrupted", "x")
FAILED: Final = Failure("engine_failed", "x")


def of(claim: Claim, step: int = 5) -> StoredCheckpoint:
    return StoredCheckpoint(f"checkpoint:{claim.id}.{claim.fence}.{step}", step, 20)


async def started(queue: JobQueue, lease: float = LEASE) -> Claim:
    """A job that runs and has left a checkpoint."""
    await submit(queue)
    claim = await claim_one(queue, lease=lease)
    assert await queue.checkpoint(claim, of(claim)) is None
    return claim


async def discarded(queue: JobQueue) -> set[tuple[str, float]]:
    return {(discard.key, discard.kept) for discard in (await queue.sweep())[0]}


async def left(redis: ArqRedis, queue: JobQueue, job_id: str) -> list[bytes | None]:
    """What the record says of checkpoints."""
    fields = ["checkpoint", "checkpoint_fence", "resumed"]
    return list(await redis.hmget(f"{queue.prefix}job:{job_id}", fields))


async def die(queue: JobQueue, claim: Claim) -> None:
    """The claim's lease runs out."""
    await queue.redis.zadd(f"{queue.prefix}leases:{queue.name}", {claim.id: 1})
    await queue.sweep()


async def test_the_next_attempt_is_given_the_checkpoint(queue: JobQueue) -> None:
    """Whatever ended the one before: a shutdown, or its worker's death."""
    claim = await started(queue)
    assert claim.checkpoint is None
    await queue.release(claim, INTERRUPTED, "interruptions")
    second = await claim_one(queue)
    assert second.checkpoint == of(claim)
    assert await queue.checkpoint(second, of(second, 9)) is None
    await die(queue, second)
    assert (await claim_one(queue)).checkpoint == of(second, 9)


async def test_a_claim_that_is_answered_again_has_it_too(queue: JobQueue) -> None:
    claim = await started(queue)
    await queue.release(claim, INTERRUPTED, "interruptions")
    claims = [(await queue.claim("w1", 1, LEASE, "token"))[0][0] for _ in range(2)]
    assert [claim_.checkpoint for claim_ in claims] == [of(claim), of(claim)]


async def test_a_stale_attempt_records_nothing(queue: JobQueue) -> None:
    """Its fence is not the job's any more, before and after the job was claimed again."""
    stale = await started(queue)
    await die(queue, stale)
    assert await queue.checkpoint(stale, of(stale, 19)) == StopReason.LEASE_LOST
    fresh = await claim_one(queue)
    assert await queue.checkpoint(stale, of(stale, 19)) == StopReason.LEASE_LOST
    assert fresh.checkpoint == of(stale)
    await queue.finish(fresh, SUCCEEDED)
    assert await queue.checkpoint(fresh, of(fresh, 19)) == StopReason.LEASE_LOST


async def test_the_answer_tells_a_job_to_stop(queue: JobQueue) -> None:
    claim = await started(queue)
    await queue.cancel(claim.id)
    assert await queue.checkpoint(claim, of(claim, 6)) == StopReason.USER


async def test_a_newer_checkpoint_discards_the_one_before(queue: JobQueue) -> None:
    """Recording one twice, because an answer was lost, discards nothing."""
    claim = await started(queue)
    for _ in range(2):
        await queue.checkpoint(claim, of(claim, 6))
    assert await discarded(queue) == {(of(claim).blob, 0)}


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED])
async def test_a_job_that_has_ended_leaves_none(queue: JobQueue, redis: ArqRedis, state: JobState) -> None:
    claim = await started(queue)
    await queue.finish(claim, Outcome(state=state))
    assert await discarded(queue) == {(of(claim).blob, 0)}
    assert await left(redis, queue, claim.id) == [None] * 3


async def test_a_queued_job_that_is_canceled_leaves_none(queue: JobQueue, redis: ArqRedis) -> None:
    claim = await started(queue)
    await queue.release(claim, INTERRUPTED, "interruptions")
    await queue.cancel(claim.id)
    assert await discarded(queue) == {(of(claim).blob, 0)}
    assert await left(redis, queue, claim.id) == [None] * 3


async def test_a_replay_begins_anew(queue: JobQueue) -> None:
    claim = await started(queue)
    await queue.finish(claim, Outcome(state=JobState.FAILED, error=FAILED))
    await queue.replay(claim.id, 60)
    assert (await claim_one(queue)).checkpoint is None


async def test_after_a_failure_the_job_begins_anew(queue: JobQueue, redis: ArqRedis) -> None:
    """The checkpoint may be the reason, whether the attempt made it or went on from it."""
    claim = await started(queue)
    await queue.release(claim, FAILED, "failures")
    second = await claim_one(queue)
    assert second.checkpoint is None
    assert await discarded(queue) == {(of(claim).blob, 0)}
    assert await left(redis, queue, claim.id) == [None] * 3


async def test_a_second_death_from_one_checkpoint_is_its_last(redis: ArqRedis) -> None:
    """The first attempt made it, the second began with it and got no further: the third begins anew."""
    queue = JobQueue(redis, rules=Rules(crash_limit=9))
    claim = await started(queue)
    await die(queue, claim)
    second = await claim_one(queue)
    assert second.checkpoint == of(claim)
    await die(queue, second)
    third = await claim_one(queue)
    assert third.checkpoint is None
    await queue.checkpoint(third, of(third))
    await die(queue, third)
    assert (await claim_one(queue)).checkpoint == of(third)


async def test_a_shutdown_in_between_keeps_it(redis: ArqRedis) -> None:
    """An attempt that was interrupted before it made one of its own says nothing against it."""
    queue = JobQueue(redis, rules=Rules(crash_limit=9))
    claim = await started(queue)
    await queue.release(claim, INTERRUPTED, "interruptions")
    await queue.release(await claim_one(queue), INTERRUPTED, "interruptions")
    assert (await claim_one(queue)).checkpoint == of(claim)


async def test_a_resumed_jobs_seconds_are_not_learned(queue: JobQueue, redis: ArqRedis) -> None:
    """Part of its steps was taken elsewhere."""
    claim = await started(queue)
    await queue.release(claim, INTERRUPTED, "interruptions")
    await queue.finish(await claim_one(queue), SUCCEEDED)
    assert await redis.keys(f"{queue.prefix}service:*") == []
    await submit(queue)
    await queue.finish(await claim_one(queue), SUCCEEDED)
    assert await redis.keys(f"{queue.prefix}service:*") != []


async def test_upkeep_deletes_checkpoints_at_once(queue: JobQueue, redis: ArqRedis) -> None:
    """However long inputs are kept."""
    blobs = RedisBlobs(redis, queue.prefix)
    claim = await started(queue)
    for key in (of(claim).blob, "input:x"):
        await blobs.put(key, b"state", claim.expires_at)
    await redis.rpush(f"{queue.prefix}discard", "0 input:x")
    await queue.finish(claim, SUCCEEDED)
    upkeep = asyncio.create_task(run_upkeep(queue, blobs, input_retention=60.0))
    async with asyncio.timeout(10):
        while await blobs.get(of(claim).blob) or await redis.zcard(f"{queue.prefix}discarding"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    upkeep.cancel()
    with suppress(asyncio.CancelledError):
        await upkeep
    assert await blobs.get("input:x") == b"state"

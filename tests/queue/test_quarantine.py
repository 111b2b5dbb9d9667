"""Jobs whose workers die: counted apart, run alone, put into quarantine, and replayed."""

import asyncio

import msgspec
import pytest
from arq.connections import ArqRedis
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus

from img2img.errors import JobNotFound, LeaseLost
from img2img.jobs import Failure, JobState, Outcome
from img2img.queue import JobQueue
from img2img.queue_types import Claim, Lifetime
from tests.queue.calls import KEEP, LEASE, SUCCEEDED, claim_one, event_types, lose, spec, submit


async def die_of_one(queue: JobQueue) -> Claim:
    """A worker claims a job and dies."""
    claim = await claim_one(queue)
    await lose(queue, claim)
    return claim


async def quarantined(queue: JobQueue) -> str:
    job_id = await submit(queue)
    for _ in range(2):
        await die_of_one(queue)
    await queue.sweep()
    return job_id


async def test_failures_crashes_and_interruptions_count_apart(queue: JobQueue) -> None:
    """Each has its own limit, and an interruption has none."""
    job_id = await submit(queue)
    await die_of_one(queue)
    await queue.release(await claim_one(queue), Failure("engine_failed", "x"), "failures")
    for _ in range(3):
        await queue.release(await claim_one(queue), Failure("interrupted", "x"), "interruptions")
    job = await queue.get(job_id)
    assert (job.state, job.attempt) == (JobState.QUEUED, 5)
    assert (job.failures, job.crashes, job.interruptions) == (1, 1, 3)
    assert [past.error.code for past in job.history] == ["worker_lost", "engine_failed"] + ["interrupted"] * 3
    assert [past.attempt for past in job.history] == [1, 2, 3, 4, 5]


async def test_a_job_that_kills_its_workers_is_quarantined(queue: JobQueue) -> None:
    job_id = await quarantined(queue)
    job = await queue.get(job_id)
    assert (job.state, job.crashes) == (JobState.FAILED, 2)
    assert job.outcome is not None
    assert job.outcome.error is not None
    assert job.outcome.error.code == "quarantined"
    assert [past.worker for past in job.history] == ["w1", "w1"]
    assert (await queue.stats()).quarantined == 1


async def test_a_quarantined_jobs_input_is_kept(queue: JobQueue, redis: ArqRedis) -> None:
    """Upkeep is told to keep it as long as the record, and that of other jobs not at all."""
    job_id = await quarantined(queue)
    await redis.rpush(f"{queue.prefix}discard", f"60000 input:{job_id}", "0 input:other")
    discarded, _ = await queue.sweep()
    assert {discard.key: discard.kept for discard in discarded} == {f"input:{job_id}": 60.0, "input:other": 0.0}


async def test_a_replay_keeps_the_input(redis: ArqRedis) -> None:
    """Upkeep has been told to delete it, but had no time yet."""
    queue = JobQueue(redis)
    job = msgspec.structs.replace(spec(queue), inputs="input:x")
    await queue.submit(job, Lifetime(60, KEEP))
    await queue.cancel(job.id)
    await queue.replay(job.id, 60)
    assert (await queue.sweep())[0] == []


async def test_a_replay_runs_once_more_under_the_same_id(queue: JobQueue, redis: ArqRedis) -> None:
    job_id = await quarantined(queue)
    assert await queue.replay(job_id, 60) == JobState.FAILED
    assert await queue.replay(job_id, 60) == JobState.QUEUED
    job = await queue.get(job_id)
    assert (job.state, job.crashes, job.replays, len(job.history)) == (JobState.QUEUED, 0, 1, 2)
    assert job.outcome is None
    arq_job = ArqJob("{0}" + job_id[1:], redis, _queue_name=queue.alive_key)
    assert await arq_job.status() == JobStatus.queued
    await queue.finish(await claim_one(queue), SUCCEEDED)
    assert (await queue.claim("w1", 1, LEASE, "again"))[0] == []
    assert (await queue.get(job_id)).state == JobState.SUCCEEDED
    assert await queue.replay(job_id, 60) == JobState.SUCCEEDED
    assert await event_types(queue, job_id) == [
        "queued", "running", "queued", "running", "failed", "queued", "running", "succeeded",
    ]  # fmt: skip
    assert (await queue.stats()).quarantined == 0


async def test_a_replayed_jobs_old_holder_is_fenced(queue: JobQueue) -> None:
    job_id = await submit(queue)
    await die_of_one(queue)
    stale = await die_of_one(queue)
    await queue.sweep()
    await queue.replay(job_id, 60)
    with pytest.raises(LeaseLost):
        await queue.finish(stale, SUCCEEDED)
    await claim_one(queue)
    with pytest.raises(LeaseLost):
        await queue.finish(stale, SUCCEEDED)


async def test_canceled_and_expired_jobs_can_be_replayed(queue: JobQueue) -> None:
    canceled, expired = await submit(queue), await submit(queue, seconds=0.001)
    await queue.cancel(canceled)
    await asyncio.sleep(0.005)
    await queue.sweep()
    for job_id in (canceled, expired):
        await queue.replay(job_id, 60)
        assert (await queue.get(job_id)).state == JobState.QUEUED
    with pytest.raises(JobNotFound):
        await queue.replay(queue.new_id(), 60)


async def test_only_the_culprit_is_found_guilty(queue: JobQueue) -> None:
    """Four jobs on a worker that dies of one: each runs alone next time, so that the three innocent ones succeed."""
    ids = [await submit(queue) for _ in range(4)]
    claims, _ = await queue.claim("w1", 4, LEASE, "all")
    assert len(claims) == 4
    await lose(queue, *claims)
    for turn in range(4):
        claims, _ = await queue.claim("w2", 4, LEASE, str(turn))
        assert [claim.suspect for claim in claims] == [True]
        if turn:
            await queue.finish(claims[0], SUCCEEDED)
        else:
            guilty = claims[0].id
            await lose(queue, *claims)
    states = {job_id: (await queue.get(job_id)).state for job_id in ids}
    assert states.pop(guilty) == JobState.FAILED
    assert set(states.values()) == {JobState.SUCCEEDED}


async def test_a_suspect_waits_for_an_idle_worker(queue: JobQueue, redis: ArqRedis) -> None:
    """A worker that holds jobs takes others meanwhile; an idle one takes the suspect first, and nothing beside it."""
    held = [await submit(queue) and await claim_one(queue, worker="busy")]
    suspect = await submit(queue)
    await die_of_one(queue)
    other = await submit(queue)
    await queue.sweep()
    await redis.zincrby(f"{queue.prefix}suspects:default", 10_000, suspect)  # its second is not over before the test
    assert (await claim_one(queue, worker="busy", held=held)).id == other
    more = await submit(queue)
    claims, _ = await queue.claim("idle", 4, LEASE, "t")
    assert [claim.id for claim in claims] == [suspect]
    assert (await claim_one(queue, worker="busy", held=held)).id == more


async def test_a_suspect_does_not_wait_for_long(queue: JobQueue, redis: ArqRedis) -> None:
    """Where no worker is idle it goes beside other jobs, one to a worker; a busy worker knows when to look again."""
    held = [await submit(queue) and await claim_one(queue, worker="busy")]
    suspects = [await submit(queue) for _ in range(2)]
    claims, _ = await queue.claim("w1", 2, LEASE, "both")
    await lose(queue, *claims)
    await queue.sweep()
    for job_id in suspects:
        await redis.zincrby(f"{queue.prefix}suspects:default", 10_000, job_id)
    claims, due = await queue.claim("busy", 4, LEASE, "too soon", held=held)
    assert claims == []
    assert due is not None
    assert 0 < due <= 11
    for job_id in suspects:
        await redis.zincrby(f"{queue.prefix}suspects:default", -11_000, job_id)
    claims, _ = await queue.claim("busy", 4, LEASE, "one", held=held)
    assert len(claims) == 1
    claims += (await queue.claim("busy", 3, LEASE, "no more", held=[*held, *claims]))[0]
    assert len(claims) == 1
    claims += (await queue.claim("other", 1, LEASE, "the other", held=held))[0]
    assert sorted(claim.id for claim in claims) == sorted(suspects)


async def test_a_refused_outcome_is_in_the_history(queue: JobQueue) -> None:
    """The attempt that ended a job is told like those before it."""
    job_id = await submit(queue)
    failed = Outcome(state=JobState.FAILED, error=Failure("model_refused", "No"))
    await queue.finish(await claim_one(queue), failed)
    job = await queue.get(job_id)
    assert [past.error for past in job.history] == [failed.error]
    assert job.failures == 1

"""Lost answers, stalled servers, failovers, other releases: what must not make anybody lose a job."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from arq.connections import ArqRedis

from img2img.errors import NoCapacity, NotReplayable
from img2img.jobs import JobState
from img2img.queue import JobQueue
from img2img.queue_types import Claim, Lifetime, Waiter, WorkerInfo
from tests.queue.calls import KEEP, LEASE, SUCCEEDED, claim_one, spec, submit

WORKER = WorkerInfo("w1", 1, "fake", "fake", "cpu")


def now() -> int:
    return int(time.time() * 1000)


async def claim_one_of(queue: JobQueue) -> Claim:
    """A fresh job, claimed."""
    await submit(queue)
    return await claim_one(queue)


async def stall(queue: JobQueue, redis: ArqRedis, seconds: float) -> None:
    """Make it look as if nobody could reach the server for so long."""
    await redis.hset(f"{queue.prefix}stall:default", "last", now() - int(1000 * seconds))


async def test_a_stalled_server_takes_no_lease(queue: JobQueue, redis: ArqRedis) -> None:
    """Leases that ran out while the server was away are left to their workers for a moment."""
    claim = await claim_one_of(queue)
    await redis.zadd(f"{queue.prefix}leases:default", {claim.id: now() - 2000})
    await stall(queue, redis, 8)
    await queue.sweep()
    assert (await queue.get(claim.id)).state == JobState.RUNNING
    assert await queue.beat(WORKER, [claim], lease=LEASE, ttl=60) == {}


async def test_a_server_that_stalls_again_takes_no_lease(queue: JobQueue, redis: ArqRedis) -> None:
    """Workers could not beat in between, either. But who sweeps seldom does not keep a dead one's jobs for ever."""
    claim = await claim_one_of(queue)
    await redis.zadd(f"{queue.prefix}leases:default", {claim.id: now() - 60_000})
    for seconds, state in ((120, JobState.RUNNING), (30, JobState.RUNNING), (30, JobState.QUEUED)):
        await stall(queue, redis, seconds)
        await queue.sweep()
        assert (await queue.get(claim.id)).state == state


async def test_a_lease_that_had_run_out_before_is_lost(queue: JobQueue, redis: ArqRedis) -> None:
    claim = await claim_one_of(queue)
    await redis.zadd(f"{queue.prefix}leases:default", {claim.id: now() - 10_000})
    await stall(queue, redis, 8)
    await queue.sweep()
    assert (await queue.get(claim.id)).crashes == 1


async def test_a_stalled_server_sends_no_caller_away(queue: JobQueue, redis: ArqRedis) -> None:
    """A caller who waits could not say so while the server was away."""
    job_id = await submit(queue, waiter=Waiter("caller", 9000, 0))
    await redis.zadd(f"{queue.prefix}abandon:default", {job_id: now() - 2000})
    await stall(queue, redis, 8)
    await queue.sweep()
    assert (await queue.get(job_id)).state == JobState.QUEUED


async def test_a_failover_repeats_no_fence(queue: JobQueue, redis: ArqRedis) -> None:
    """A replica that has not seen the latest fences still gives larger ones."""
    first = await claim_one_of(queue)
    await redis.decrby(f"{queue.prefix}fence", 1)
    second = await claim_one_of(queue)
    await redis.delete(f"{queue.prefix}fence")
    third = await claim_one_of(queue)
    assert first.fence < second.fence < third.fence


async def test_a_claim_that_is_answered_again_has_a_whole_lease(queue: JobQueue, redis: ArqRedis) -> None:
    await submit(queue)
    [lost], _ = await queue.claim("w1", 1, LEASE, "token")
    await redis.zadd(f"{queue.prefix}leases:default", {lost.id: now() + 100})
    [claim], _ = await queue.claim("w1", 1, LEASE, "token")
    assert claim.fence == lost.fence
    left = await redis.zscore(f"{queue.prefix}leases:default", claim.id) - now()
    assert left > 1000 * LEASE - 2000


async def test_a_worker_that_leaves_gives_back_what_it_never_got(queue: JobQueue) -> None:
    job_id = await submit(queue)
    await queue.claim("w1", 1, LEASE, "nobody reads the answer")
    await queue.sign_off("w1")
    job = await queue.get(job_id)
    assert (job.state, job.crashes, job.interruptions) == (JobState.QUEUED, 0, 1)


async def test_a_record_of_another_release_hides_no_others(queue: JobQueue, redis: ArqRedis) -> None:
    first, second, third = [await submit(queue) for _ in range(3)]
    await redis.hset(f"{queue.prefix}job:{second}", "spec", b'{"id": 1}')
    page = await queue.list_jobs("acme")
    assert [job.id for job in page.jobs] == [third, first]


async def test_a_job_of_another_release_goes_back(queue: JobQueue, redis: ArqRedis) -> None:
    """What a worker cannot read stops neither it nor the job beside it."""
    strange, known = await submit(queue), await submit(queue)
    key = f"{queue.prefix}job:{strange}"
    record = msgspec.json.decode(await redis.hget(key, "spec"))
    record["options"]["output_format"] = "hologram"
    await redis.hset(key, "spec", msgspec.json.encode(record))
    claims, _ = await queue.claim("w1", 2, LEASE, "both")
    assert [claim.id for claim in claims] == [known]
    assert (await queue.stats()).delayed == 1


async def test_outcomes_that_are_written_together_are_judged_apart(queue: JobQueue) -> None:
    """One of three was lost meanwhile: the others are written."""
    claims = [await claim_one_of(queue) for _ in range(3)]
    stale = msgspec.structs.replace(claims[1], fence=1)
    written = [queue.finish(claim, SUCCEEDED) for claim in (claims[0], stale, claims[2])]
    answers = await asyncio.gather(*written, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["NoneType", "LeaseLost", "NoneType"]
    states = [(await queue.get(claim.id)).state for claim in claims]
    assert states == [JobState.SUCCEEDED, JobState.RUNNING, JobState.SUCCEEDED]


async def test_what_is_due_is_dealt_with_in_portions(queue: JobQueue) -> None:
    """After an outage many jobs have expired: no call ends them all, and a worker comes back at once for more."""
    for _ in range(250):
        await submit(queue, seconds=0.001)
    late = await submit(queue)
    await asyncio.sleep(0.01)
    claims, due = await queue.claim("w1", 1, LEASE, "first")
    assert (claims, due) == ([], 0)
    for turn in range(5):
        claims, _ = await queue.claim("w1", 1, LEASE, f"again {turn}")
        if claims:
            break
    assert [claim.id for claim in claims] == [late]


async def test_deferred_jobs_keep_nobody_busy(queue: JobQueue) -> None:
    await queue.beat(WORKER, [], lease=LEASE, ttl=60)
    await submit(queue, options={"not_before": (datetime.now(UTC) + timedelta(days=7)).isoformat()})
    await submit(queue, options={"reject_if_busy": True})
    with pytest.raises(NoCapacity):
        await submit(queue, options={"reject_if_busy": True})


async def test_a_discarded_input_is_told_again_until_it_is_gone(queue: JobQueue, redis: ArqRedis) -> None:
    """A gateway may die between hearing of it and deleting it."""
    job = msgspec.structs.replace(spec(queue), inputs="input:x")
    await queue.submit(job, Lifetime(60, KEEP))
    await queue.cancel(job.id)
    [discard], _ = await queue.sweep()
    assert (await queue.sweep())[0] == []
    with pytest.raises(NotReplayable):
        await queue.replay(job.id, 60)
    await redis.zincrby(f"{queue.prefix}discarding", -120_000, discard.word)
    assert (await queue.sweep())[0] == [discard]
    await queue.discarded(discard)
    assert await redis.exists(f"{queue.prefix}discarding") == 0


async def test_a_replay_keeps_its_priority(queue: JobQueue) -> None:
    urgent = await submit(queue, options={"priority": 10})
    await queue.cancel(urgent)
    await submit(queue)
    await queue.replay(urgent, 60)
    assert (await claim_one(queue)).id == urgent

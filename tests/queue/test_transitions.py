"""The queue's promises, on a real server: one transition at a time."""

import asyncio
import time

import msgspec
import pytest
from arq.connections import ArqRedis
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus

from img2img.errors import ConfigurationError, IdempotencyConflict, JobNotFound, LeaseLost, NoCapacity, Unavailable
from img2img.events import EventHub
from img2img.jobs import Failure, JobState, Outcome, Running, Stage, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Join, Lifetime, Rules, Waiter, WorkerInfo
from img2img.server import check_server, open_redis
from tests.queue.books import age
from tests.queue.calls import KEEP, LEASE, SUCCEEDED, claim_one, event_types, lose, spec, submit


async def test_a_job_goes_from_submit_to_success(queue: JobQueue) -> None:
    """Submit, claim, report, finish; the record and the log tell the same story."""
    job_id = await submit(queue)
    assert (await queue.get(job_id)).queue_position == 0
    claim = await claim_one(queue)
    assert (claim.id, claim.attempt) == (job_id, 1)
    assert await queue.report(claim, Running(executed_by="w1", stage=Stage.STEPS, step=1, steps=20)) is None
    await queue.finish(claim, SUCCEEDED)
    job = await queue.get(job_id)
    assert job.state == JobState.SUCCEEDED
    assert job.running is not None
    assert job.running.step == 1
    assert await event_types(queue, job_id) == ["queued", "running", "progress", "succeeded"]


async def test_finishing_twice_changes_nothing(queue: JobQueue) -> None:
    """A finish whose answer was lost may be sent again."""
    job_id = await submit(queue)
    claim = await claim_one(queue)
    await queue.finish(claim, SUCCEEDED)
    await queue.finish(claim, Outcome(state=JobState.FAILED))
    assert (await queue.get(job_id)).state == JobState.SUCCEEDED


@pytest.mark.parametrize("attempts", [1, 2])
async def test_giving_back_twice_gives_back_once(redis: ArqRedis, attempts: int) -> None:
    """A release whose answer was lost may be sent again, also when the job was claimed or has ended meanwhile."""
    queue = JobQueue(redis, rules=Rules(attempts=attempts))
    job_id = await submit(queue)
    claim = await claim_one(queue)
    for _ in range(2):
        await queue.release(claim, Failure("engine_failed", "x"), "failures")
    job = await queue.get(job_id)
    assert (job.state, job.failures) == (JobState.QUEUED if attempts > 1 else JobState.FAILED, 1)
    if attempts > 1:
        fresh = await claim_one(queue)
        await queue.release(claim, Failure("engine_failed", "x"), "failures")
        await queue.finish(fresh, SUCCEEDED)


async def test_submitting_the_same_id_twice_makes_one_job(queue: JobQueue) -> None:
    """A submit whose answer was lost may be sent again."""
    one = spec(queue)
    await queue.submit(one, Lifetime(60, KEEP))
    await queue.submit(one, Lifetime(60, KEEP))
    assert (await queue.stats()).queued == 1


async def test_an_expired_lease_gives_the_job_back_and_fences_its_holder(queue: JobQueue) -> None:
    """A worker that stopped for longer than its lease can write nothing any more."""
    job_id = await submit(queue)
    stale = await claim_one(queue)
    await lose(queue, stale)
    fresh = await claim_one(queue, worker="w2")
    assert (fresh.id, fresh.attempt) == (job_id, 2)
    assert fresh.fence > stale.fence
    with pytest.raises(LeaseLost):
        await queue.finish(stale, SUCCEEDED)
    with pytest.raises(LeaseLost):
        await queue.release(stale, Failure("engine_failed", "x"), "failures")
    assert await queue.report(stale, Running(executed_by="w1")) == StopReason.LEASE_LOST
    await queue.finish(fresh, SUCCEEDED)
    assert await event_types(queue, job_id) == ["queued", "running", "queued", "running", "succeeded"]


async def test_a_job_whose_workers_all_die_fails(queue: JobQueue) -> None:
    """A job that its workers die of goes into quarantine."""
    job_id = await submit(queue)
    for _ in range(2):
        await lose(queue, await claim_one(queue))
    assert await queue.claim("w3", 1, LEASE, "t") == ([], None)
    job = await queue.get(job_id)
    assert job.state == JobState.FAILED
    assert job.outcome is not None
    assert job.outcome.error is not None
    assert job.outcome.error.code == "quarantined"


async def test_a_claim_whose_answer_was_lost_is_answered_again(queue: JobQueue) -> None:
    """The same token hands out the same jobs under the same fences; the next one hands out the next."""
    first, second = await submit(queue), await submit(queue)
    once, _ = await queue.claim("w1", 1, LEASE, "one")
    again, _ = await queue.claim("w1", 1, LEASE, "one")
    assert [(claim.id, claim.fence, claim.attempt) for claim in once] == [(first, once[0].fence, 1)]
    assert [(claim.id, claim.fence, claim.attempt) for claim in again] == [(first, once[0].fence, 1)]
    assert [claim.id for claim in (await queue.claim("w1", 1, LEASE, "two"))[0]] == [second]


async def test_members_without_a_record_are_swept_away(queue: JobQueue, redis: ArqRedis) -> None:
    """A record that expired before anybody swept leaves nothing that could stop the queue."""
    ended = [await submit(queue) for _ in range(3)]
    await queue.release(await claim_one(queue), Failure("engine_failed", "x"), "failures", delay=0.001)
    await lose(queue, await claim_one(queue))
    for job_id in ended:
        await redis.delete(f"{queue.prefix}job:{job_id}")
    await asyncio.sleep(0.01)
    await queue.sweep()
    fresh = await submit(queue)
    assert (await claim_one(queue)).id == fresh
    for index in ("ready", "delayed", "expiry"):
        assert await redis.exists(f"{queue.prefix}{index}:default") == 0, index


async def test_another_queues_gateway_can_cancel(queue: JobQueue, redis: ArqRedis) -> None:
    """A job's own indexes are cleaned, whichever queue the caller looks at; its key joins nothing elsewhere."""
    other = JobQueue(redis, "other")
    join = Join("key:acme:k", "idempotency", 60_000)
    job_id = await submit(queue, join=join)
    assert await submit(other, join=join) != job_id
    assert await other.cancel(job_id) == JobState.CANCELED
    assert (await queue.claim("w1", 1, LEASE, "t"))[0] == []


async def test_joining_without_waiting_keeps_the_job(queue: JobQueue, redis: ArqRedis) -> None:
    """A job that somebody asked for without waiting goes on when the one who waited has left."""
    join, waiter = Join("key:acme:k", "idempotency", 60_000), Waiter("one", 60_000, 1)
    job_id = await submit(queue, join=join, waiter=waiter)
    assert await submit(queue, join=join) == job_id
    await queue.leave(job_id, waiter)
    await age(redis, 1000)
    await queue.sweep()
    assert (await queue.get(job_id)).state == JobState.QUEUED


async def test_a_beat_keeps_the_lease(queue: JobQueue, redis: ArqRedis) -> None:
    """A claim that is beaten for stays; one that is not held any more is told so."""
    await submit(queue, seconds=600)
    claim = await claim_one(queue)
    info = WorkerInfo("w1", 1, "fake", "fake", "cpu")
    for _ in range(2):
        await age(redis, int(600 * LEASE))
        assert await queue.beat(info, [claim], lease=LEASE, ttl=LEASE) == {}
    assert (await queue.claim("w2", 1, LEASE, "t"))[0] == []
    gone = msgspec.structs.replace(claim, fence=claim.fence + 1)
    assert await queue.beat(info, [gone], lease=LEASE, ttl=LEASE) == {gone.fence: StopReason.LEASE_LOST}


async def test_a_released_job_keeps_its_place(queue: JobQueue) -> None:
    """An interrupted job is run before jobs that were submitted after it, and loses no attempt."""
    first = await submit(queue)
    claim = await claim_one(queue)
    await submit(queue)
    await queue.release(claim, Failure("interrupted", "shutdown"), "interruptions")
    assert (await claim_one(queue)).id == first


async def test_a_failed_attempt_waits_for_its_delay(queue: JobQueue, redis: ArqRedis) -> None:
    """Back-off: the job is not handed out before it is due, and the worker is told when that is."""
    job_id = await submit(queue, seconds=600)
    await queue.release(await claim_one(queue), Failure("engine_failed", "x"), "failures", delay=100)
    claims, due = await queue.claim("w1", 1, LEASE, "t")
    assert claims == []
    assert due is not None
    assert 0 < due <= 100
    await age(redis, 100_000)
    assert (await claim_one(queue)).id == job_id


async def test_attempts_are_counted_by_failures(queue: JobQueue) -> None:
    """The last failed attempt ends the job with its error; interruptions before it did not count."""
    job_id = await submit(queue)
    await queue.release(await claim_one(queue), Failure("interrupted", "x"), "interruptions")
    await queue.release(await claim_one(queue), Failure("engine_failed", "first"), "failures")
    await queue.release(await claim_one(queue), Failure("engine_failed", "second"), "failures")
    job = await queue.get(job_id)
    assert (job.state, job.attempt) == (JobState.FAILED, 3)
    assert job.outcome is not None
    assert job.outcome.error == Failure("engine_failed", "second")


async def test_cancel_in_every_state(queue: JobQueue) -> None:
    """A queued job ends at once, a running one's worker is told, an ended one stays as it is."""
    queued = await submit(queue)
    assert await queue.cancel(queued) == JobState.CANCELED
    assert await queue.cancel(queued) == JobState.CANCELED
    running = await submit(queue)
    claim = await claim_one(queue)
    assert await queue.cancel(running) == JobState.RUNNING
    assert await queue.next_stop("w1", 1) == running
    assert await queue.report(claim, Running(executed_by="w1")) == StopReason.USER
    await queue.finish(claim, Outcome(state=JobState.CANCELED))
    assert (await queue.get(running)).state == JobState.CANCELED
    with pytest.raises(JobNotFound):
        await queue.cancel("0-nothing")


async def test_a_canceled_job_is_not_run_again_when_its_worker_dies(queue: JobQueue) -> None:
    """The wish to stop survives the worker that was told."""
    job_id = await submit(queue)
    claim = await claim_one(queue)
    await queue.cancel(job_id)
    await lose(queue, claim)
    assert (await queue.claim("w2", 1, LEASE, "t"))[0] == []
    assert (await queue.get(job_id)).state == JobState.CANCELED


async def test_an_expired_job_never_starts(queue: JobQueue) -> None:
    """A claim and a sweep both end it."""
    for look in (queue.sweep, lambda: queue.claim("w1", 1, LEASE, "t")):
        job_id = await submit(queue, seconds=0.001)
        await asyncio.sleep(0.01)
        await look()
        assert (await queue.get(job_id)).state == JobState.EXPIRED


async def test_priority_is_a_head_start(queue: JobQueue) -> None:
    """A higher priority overtakes what was submitted shortly before it."""
    low, normal, high = [await submit(queue, options={"priority": value}) for value in (-1, 0, 1)]
    assert [(await claim_one(queue)).id for _ in range(3)] == [high, normal, low]


async def test_idempotency_and_conflict(queue: JobQueue) -> None:
    """The same key and body give the first job, another body is refused, another key is another job."""
    join = Join("key:acme:k", "idempotency", 60_000)
    first = await submit(queue, join=join)
    assert await submit(queue, join=join) == first
    assert await submit(queue, join=Join("key:acme:other", "idempotency", 60_000)) != first
    with pytest.raises(IdempotencyConflict):
        await queue.submit(spec(queue, prompt="a cat"), Lifetime(60, KEEP), join=join)


async def test_only_a_retry_joins_a_call(queue: JobQueue) -> None:
    """Two equal first calls are two jobs; a retry joins the later one, unless that has failed."""
    first, retry = Join("call:acme:f", "first", 60_000), Join("call:acme:f", "retry", 60_000)
    one = await submit(queue, join=first)
    two = await submit(queue, join=first)
    assert one != two
    assert await submit(queue, join=retry) == two
    await queue.cancel(two)
    assert await submit(queue, join=retry) not in (one, two)


async def test_reject_if_busy_counts_free_slots(queue: JobQueue) -> None:
    """No worker, or as many jobs as slots: refused. A free slot: accepted."""
    busy = {"reject_if_busy": True}
    with pytest.raises(NoCapacity):
        await submit(queue, options=busy)
    worker = WorkerInfo("w1", 1, "fake", "fake", "cpu")
    await queue.beat(msgspec.structs.replace(worker, slots=0), [], lease=LEASE, ttl=LEASE)
    with pytest.raises(NoCapacity):
        await submit(queue, options=busy)
    await queue.beat(worker, [], lease=LEASE, ttl=LEASE)
    await submit(queue, options=busy)
    with pytest.raises(NoCapacity):
        await submit(queue, options=busy)


async def test_a_worker_that_is_paused_is_listed_and_one_that_drains_is_not(queue: JobQueue) -> None:
    """Neither takes a job now, but one of them will again; a worker of an earlier release says nothing of pauses."""
    worker = WorkerInfo("w1", 1, "fake", "fake", "cpu")
    paused = msgspec.structs.replace(worker, slots=0, paused=True)
    for said, listed in ((worker, (worker,)), (paused, (paused,)), (msgspec.structs.replace(worker, slots=0), ())):
        await queue.beat(said, [], lease=LEASE, ttl=LEASE)
        assert (await queue.stats()).workers == listed


async def test_the_last_waiter_to_leave_starts_the_grace_period(queue: JobQueue, redis: ArqRedis) -> None:
    """With two waiters one may go; after the last, the job ends when its grace is over."""
    one, two = Waiter("one", 60_000, 20), Waiter("two", 60_000, 20)
    job_id = await submit(queue, waiter=one)
    await queue.wait_for(job_id, two)
    await queue.leave(job_id, one)
    await age(redis, 1000)
    await queue.sweep()
    assert (await queue.get(job_id)).state == JobState.QUEUED
    await queue.leave(job_id, two)
    await age(redis, 1000)
    await queue.sweep()
    job = await queue.get(job_id)
    assert (job.state, job.stop_requested) == (JobState.CANCELED, StopReason.DISCONNECT)


async def test_a_job_without_waiters_needs_none(queue: JobQueue) -> None:
    """Only jobs of synchronous calls end when nobody waits."""
    job_id = await submit(queue)
    await queue.leave(job_id, Waiter("one", 1, 1))
    await queue.sweep()
    assert (await queue.get(job_id)).state == JobState.QUEUED


async def test_arq_answers_for_our_jobs(queue: JobQueue, redis: ArqRedis) -> None:
    """``arq.jobs.Job`` knows status, definition and result, in JSON instead of pickle."""
    job_id = await submit(queue)
    arq_job = ArqJob("{0}" + job_id[1:], redis, queue.alive_key, msgspec.json.decode)
    assert await arq_job.status() == JobStatus.queued
    info = await arq_job.info()
    assert info is not None
    assert (info.function, list(info.args)) == ("generate", [job_id])
    claim = await claim_one(queue)
    assert await arq_job.status() == JobStatus.in_progress
    await queue.finish(claim, SUCCEEDED)
    assert await arq_job.status() == JobStatus.complete
    assert msgspec.json.decode(await arq_job.result(timeout=1))["state"] == "succeeded"


async def test_a_follower_misses_nothing(queue: JobQueue) -> None:
    """Events come in order and without gaps, also to one who resumes in the middle."""
    job_id = await submit(queue)
    async with EventHub(queue) as hub, hub.follow(job_id) as all_of_it, hub.follow(job_id, after=2) as rest:
        claim = await claim_one(queue)
        for step in range(5):
            await queue.report(claim, Running(executed_by="w1", step=step, steps=5))
        await queue.finish(claim, SUCCEEDED)
        for follower, first in ((all_of_it, 1), (rest, 3)):
            seen: list[int] = []
            while not seen or seen[-1] < 8:
                seen += [event.seq for event in await follower.next(10)]
            assert seen == list(range(first, 9))


async def test_a_lost_subscription_is_caught_up(queue: JobQueue, redis: ArqRedis) -> None:
    """When the server drops every pub/sub connection, the hub subscribes again and reads what it missed."""
    job_id = await submit(queue)
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        assert [event.type for event in await follower.next(10)] == ["queued"]
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await queue.cancel(job_id)
        events = []
        while not events:
            events = await follower.next(10)
        assert [event.type for event in events] == ["canceled"]


async def test_waking(queue: JobQueue) -> None:
    """A submit wakes a worker that sleeps; without one it sleeps no longer than asked."""
    sleeper = asyncio.create_task(queue.wait_for_work(30))
    await submit(queue)
    await asyncio.wait_for(sleeper, 10)
    await queue.wait_for_work(0.01)


async def test_ended_jobs_leave_nothing_but_their_record(queue: JobQueue, redis: ArqRedis) -> None:
    """Indexes are empty again after every job has ended."""
    for outcome in (SUCCEEDED, Outcome(state=JobState.FAILED)):
        await submit(queue, waiter=Waiter("one", 60_000, 20))
        await queue.finish(await claim_one(queue), outcome)
    await queue.cancel(await submit(queue))
    for index in ("ready", "delayed", "leases", "expiry", "abandon"):
        assert await redis.exists(f"{queue.prefix}{index}:default") == 0, index
    assert await redis.exists(queue.alive_key) == 0


async def test_a_server_that_would_drop_keys_is_refused(redis: ArqRedis) -> None:
    """Any maxmemory-policy but noeviction stops the start."""
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigurationError, match="noeviction"):
            await check_server(redis)
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")
    await check_server(redis)


async def test_an_unreachable_server_is_named() -> None:
    """Connection errors come out as Unavailable, whatever redis-py called them."""
    async with open_redis("redis://127.0.0.1:1/0") as nowhere:
        with pytest.raises(Unavailable):
            await JobQueue(nowhere).submit(spec(JobQueue(nowhere)), Lifetime(1, 1))


async def test_ids_sort_by_time() -> None:
    """uuid7 behind the shard's number."""
    first = JobQueue.new_id()
    deadline = time.time_ns() + 2_000_000
    while time.time_ns() < deadline:
        pass
    assert first < JobQueue.new_id()
    assert first.startswith("0-")

"""What is refused because too much waits, and what may not start yet."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from arq.connections import ArqRedis

from img2img.errors import AccountQueueFull, DeadlineUnreachable, QueueFull
from img2img.jobs import Failure, JobState
from img2img.queue import JobQueue
from img2img.queue_types import Lifetime, Rules, Share, WorkerInfo
from img2img.server import milliseconds
from tests.queue.books import age
from tests.queue.calls import KEEP, LEASE, SUCCEEDED, claim_one, event_types, spec, submit

WORKER = WorkerInfo("w1", 1, "fake", "fake", "cpu", 256 * 256)
INTERRUPTED = Failure("interrupted", "The worker is shutting down")


async def measure(queue: JobQueue, seconds: float, count: int = 3) -> None:
    """Let jobs be measured that run about ``seconds``, on a worker with one slot."""
    await queue.beat(WORKER, [], lease=LEASE, ttl=60)
    for _ in range(count):
        await submit(queue)
        claim = await claim_one(queue)
        await asyncio.sleep(seconds)
        await queue.finish(claim, SUCCEEDED)


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


async def test_the_queue_takes_as_many_as_it_may(redis: ArqRedis) -> None:
    """What waits counts, not what runs; what goes back is always taken."""
    queue = JobQueue(redis, rules=Rules(max_queued=2))
    first = await submit(queue)
    await submit(queue, account="other")
    with pytest.raises(QueueFull) as refused:
        await submit(queue, account="third")
    assert refused.value.retry_after >= 1
    claim = await claim_one(queue)
    assert claim.id == first
    await submit(queue)
    await queue.release(claim, INTERRUPTED, "interruptions")
    assert (await queue.stats()).queued == 3
    with pytest.raises(QueueFull):
        await submit(queue)


async def test_an_account_has_a_limit_of_its_own(queue: JobQueue) -> None:
    share = Share(max_queued=1)
    await submit(queue, share=share)
    with pytest.raises(AccountQueueFull):
        await submit(queue, share=share)
    await submit(queue, account="other", share=share)
    await claim_one(queue)
    await submit(queue, share=share)


async def test_exactly_as_many_are_accepted_at_once(redis: ArqRedis) -> None:
    """800 submissions at once, room for 500."""
    queue = JobQueue(redis, rules=Rules(max_queued=500))
    answers = await asyncio.gather(*(submit(queue) for _ in range(800)), return_exceptions=True)
    assert sum(isinstance(answer, str) for answer in answers) == 500
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 300
    assert (await queue.stats()).queued == 500


async def test_a_refusal_says_how_long_the_queue_is(redis: ArqRedis) -> None:
    queue = JobQueue(redis, rules=Rules(max_queued=3))
    await measure(queue, 0.05)
    for _ in range(3):
        await submit(queue)
    with pytest.raises(QueueFull) as refused:
        await submit(queue)
    assert refused.value.eta is not None
    assert refused.value.eta > 0.1
    assert "would be done in about" in str(refused.value)


async def test_a_hopeless_deadline_is_refused(queue: JobQueue) -> None:
    """Behind a second of work nothing is done in a tenth; without measurements nobody knows, and it is taken."""
    await submit(queue, seconds=0.1)
    await measure(queue, 0.1)
    for _ in range(10):
        await submit(queue)
    with pytest.raises(DeadlineUnreachable) as refused:
        await queue.submit(spec(queue), Lifetime(0.1, KEEP, asked_for=True))
    assert refused.value.eta is not None
    assert refused.value.eta > 0.1
    await queue.submit(spec(queue), Lifetime(60, KEEP, asked_for=True))


async def test_nobody_is_refused_for_an_estimate_when_told_so(redis: ArqRedis) -> None:
    queue = JobQueue(redis, rules=Rules(refuse_late=False))
    await measure(queue, 0.1)
    for _ in range(5):
        await submit(queue)
    await queue.submit(spec(queue), Lifetime(0.1, KEEP, asked_for=True))


async def test_the_age_of_the_oldest_job_is_that_of_the_first_that_may_start(queue: JobQueue) -> None:
    """Neither one that may not start yet counts, nor one that runs, nor one that has ended."""

    async def oldest() -> float:
        return (await queue.stats()).oldest_seconds

    await submit(queue, options={"not_before": in_seconds(100)})
    assert await oldest() == 0
    first, second = await submit(queue), await submit(queue)
    async with asyncio.timeout(10):
        while (before := await oldest()) == 0:  # noqa: ASYNC110 - the server's clock has milliseconds
            await asyncio.sleep(0)
    assert (await claim_one(queue)).id == first
    assert await oldest() <= before + 10
    await queue.cancel(second)
    assert await oldest() == 0


async def test_the_age_of_a_job_that_waits_again_begins_anew(queue: JobQueue) -> None:
    """A released one counts from its return; while it rests it may not start."""
    await submit(queue)
    claim = await claim_one(queue)
    await queue.release(claim, Failure("engine_failed", "why"), "failures", delay=100)
    assert (await queue.stats()).delayed == 1
    assert (await queue.stats()).oldest_seconds == 0


async def test_a_deferred_job_starts_no_sooner(queue: JobQueue, redis: ArqRedis) -> None:
    """It waits out of everybody's way, and is ready at its time."""
    deferred = await submit(queue, options={"not_before": in_seconds(100)})
    other = await submit(queue)
    claim = await claim_one(queue)
    assert claim.id == other
    await queue.finish(claim, SUCCEEDED)
    claims, due = await queue.claim("w1", 1, LEASE, "none yet")
    assert claims == []
    assert due is not None
    assert 0 < due <= 100.001  # times are rounded up to whole milliseconds
    assert (await queue.stats()).delayed == 1
    await age(redis, milliseconds(due))
    claim = await claim_one(queue)
    assert claim.id == deferred
    assert await event_types(queue, deferred) == ["queued", "running"]


async def test_a_deferred_jobs_time_counts_from_its_start(queue: JobQueue, redis: ArqRedis) -> None:
    """Deferred for days, with an age limit of one: it expires after its start, and its keys outlive that."""
    days = 5 * 24 * 3600.0
    job_id = await submit(queue, seconds=24 * 3600, options={"not_before": in_seconds(days)})
    job = await queue.get(job_id)
    assert job.expires_at - job.created_at == pytest.approx(1000 * (days + 24 * 3600), abs=5000)
    left = 1000 * (days + 24 * 3600 + KEEP) - 5000
    arq_id = "{0}" + job_id[1:]
    for key in (f"{queue.prefix}job:{job_id}", f"{queue.prefix}events:{job_id}", f"arq:job:{arq_id}"):
        assert await redis.pttl(key) > left, key


async def test_a_parked_job_survives(queue: JobQueue, redis: ArqRedis) -> None:
    """A job given back for a day keeps its record, its payload and its place among the live."""
    job_id = await submit(queue, seconds=2 * 24 * 3600)
    await queue.release(await claim_one(queue), INTERRUPTED, "interruptions", delay=24 * 3600)
    arq_id = "{0}" + job_id[1:]
    for key in (f"{queue.prefix}job:{job_id}", f"{queue.prefix}events:{job_id}", f"arq:job:{arq_id}"):
        assert await redis.pttl(key) > 2 * 24 * 3600 * 1000, key
    assert await redis.zscore(queue.alive_key, arq_id) is not None
    assert (await queue.get(job_id)).state == JobState.QUEUED
    assert (await queue.cancel(job_id)) == JobState.CANCELED


@pytest.mark.parametrize("has_started", [False, True])
async def test_an_expired_job_tells_whether_it_had_started(redis: ArqRedis, has_started: bool) -> None:
    """Of one that had, the history says what went wrong; of another, the queue was too long."""
    queue = JobQueue(redis)
    job_id = await submit(queue)
    if has_started:
        await queue.release(await claim_one(queue), INTERRUPTED, "interruptions")
    await redis.hset(f"{queue.prefix}job:{job_id}", "expires", 1)  # type: ignore[misc]
    assert (await queue.claim("w1", 1, LEASE, "t"))[0] == []
    outcome = (await queue.get(job_id)).outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.message == "The deadline passed before the job could start" + " again" * has_started


async def test_a_page_of_one_state_takes_few_trips(queue: JobQueue, redis: ArqRedis) -> None:
    """However short the page is, and however far between its jobs are."""
    mine = [await submit(queue) for _ in range(150)]
    await queue.cancel(mine[0])
    await redis.config_resetstat()
    page = await queue.list_jobs("acme", state=JobState.CANCELED, limit=1)
    assert [job.id for job in page.jobs] == [mine[0]]
    assert (await redis.info("commandstats"))["cmdstat_zrevrange"]["calls"] == 2

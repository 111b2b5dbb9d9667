"""Which pool a job goes to, and when it moves on."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from arq.connections import ArqRedis

from gateway.upkeep import run_upkeep_of_others
from img2img.blobs import RedisBlobs
from img2img.errors import NoCapacity, QueueFull
from img2img.events import EventHub
from img2img.jobs import JobState, Move
from img2img.queue import JobQueue
from img2img.queue_types import Candidate, Join, Share, Waiter
from tests.queue.books import age
from tests.queue.calls import LEASE, SUCCEEDED, claim_one, lose, submit
from tests.queue.pools import BUSY, go_away, look, measure, measured, pool_of, pools, work


async def test_the_first_pool_that_is_fine_is_taken(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """Also while nothing was measured in it."""
    await work(local)
    await work(burst)
    assert await pool_of(queue, await submit(queue, pools=pools())) == "local"
    assert ((await local.stats()).queued, (await burst.stats()).queued) == (1, 0)


async def test_a_pool_without_workers_is_passed_over(queue: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    assert await pool_of(queue, await submit(queue, pools=pools())) == "burst"


async def test_with_nobody_anywhere_a_job_waits_in_the_first(queue: JobQueue) -> None:
    assert await pool_of(queue, await submit(queue, pools=pools())) == "local"


async def test_a_first_worker_is_given_time_to_come_up(
    queue: JobQueue, redis: ArqRedis, local: JobQueue, burst: JobQueue
) -> None:
    """Then the pool counts as dead, for those who wait in it and for those who come."""
    await work(burst)
    both = pools(local={"start": 20_000})
    job_id = await submit(queue, pools=both)
    await look(local, burst)
    assert await pool_of(queue, job_id) == "local"
    await age(redis, 20_000)
    await look(local)
    assert await pool_of(queue, job_id) == "burst"
    assert await pool_of(queue, await submit(queue, pools=both)) == "burst"
    await work(local)
    assert await pool_of(queue, await submit(queue, pools=both)) == "local"


async def test_a_stated_wait_is_kept_at_submission(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(local)
    await work(burst)
    await measured(local, 0.1)
    places = [await pool_of(queue, await submit(queue, pools=pools(local={"max_wait": 250}))) for _ in range(8)]
    assert places[:2] == ["local", "local"]
    assert places[-1] == "burst"
    assert await pool_of(queue, await submit(queue, pools=pools())) == "local"


async def test_a_deadline_is_kept_at_submission(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """A job that the first pool would hardly finish in time goes on; refused is only what no pool can do in time."""
    await work(local)
    await work(burst)
    await measure(local, 0.2)
    for _ in range(5):
        await submit(queue, pools=pools())
    assert await pool_of(queue, await submit(queue, seconds=0.7, pools=pools())) == "burst"
    assert await pool_of(queue, await submit(queue, seconds=50, pools=pools())) == "local"


async def test_a_full_pool_is_passed_over(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(local)
    await work(burst)
    both = pools(local={"max_queued": 1}, burst={"max_queued": 1})
    assert [await pool_of(queue, await submit(queue, pools=both)) for _ in range(2)] == ["local", "burst"]
    with pytest.raises(QueueFull):
        await submit(queue, pools=both)


async def test_a_job_in_a_hurry_takes_whoever_is_free(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(local)
    await work(burst)
    hurry = {"reject_if_busy": True}
    places = [await pool_of(queue, await submit(queue, options=hurry, pools=pools())) for _ in range(2)]
    assert places == ["local", "burst"]
    with pytest.raises(NoCapacity):
        await submit(queue, options=hurry, pools=pools())


async def test_queued_jobs_leave_a_dead_pool(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """All of them, those too whose worker died; their logs tell, and nothing of them is left behind."""
    await work(local)
    jobs = [await submit(queue, account=f"t{number % 3}", pools=pools()) for number in range(45)]
    claim = await claim_one(local, worker="at-local")
    await lose(local, claim)
    await go_away(local)
    await work(burst)
    for _ in range(5):
        await look(local)
    assert {await pool_of(queue, job_id) for job_id in jobs} == {"burst"}
    assert ((await local.stats()).queued, (await burst.stats()).queued) == (0, 45)
    events = await local.redis.lrange(queue.events_key(claim.id), 0, -1)  # type: ignore[misc]
    assert b'"no_workers"' in events[-1]
    ended = set()
    for _ in range(46):
        claims, _ = await burst.claim("at-burst", 64, LEASE, token=str(len(ended)), engine="fake/fake")
        for taken in claims:
            await burst.finish(taken, SUCCEEDED)
            ended.add(taken.id)
    assert ended == set(jobs)


async def test_jobs_of_a_dead_pool_are_looked_at_in_turn(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """Those behind many that cannot go, too; and all of them when somebody works there again."""
    dear = pools(burst={"price": 10, "tenant_cap": 9})
    jobs = [await submit(queue, pools=pools() if 20 <= number < 40 else dear) for number in range(60)]
    await work(burst)
    for _ in range(3):
        await look(local)
    assert [await pool_of(queue, job_id) for job_id in jobs] == ["local"] * 20 + ["burst"] * 20 + ["local"] * 20
    await work(local)
    assert [due for _, due in [await local.sweep() for _ in range(2)]] == [0, 0]


async def test_the_log_tells_of_a_move(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    job_id = await submit(queue, pools=pools(local={"start": 1}))
    await asyncio.sleep(0.01)
    await look(local)
    async with EventHub(queue) as hub, hub.follow(job_id) as follower:
        moved = (await follower.read())[-1]
    assert (moved.type, moved.data["pool"], moved.move) == ("queued", "burst", Move("local", "no_workers"))


async def test_what_waits_too_long_moves_on(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """Nothing was measured, so that nobody could foresee it."""
    await work(local)
    await submit(queue, pools=[Candidate("local")])
    await claim_one(local)
    job_id = await submit(queue, pools=pools(local={"max_wait": 100}))
    await work(burst)
    await asyncio.sleep(1.1)
    await look(local)
    assert await pool_of(queue, job_id) == "burst"


async def test_time_in_which_a_job_ran_was_no_wait(
    queue: JobQueue, redis: ArqRedis, local: JobQueue, burst: JobQueue
) -> None:
    """Its worker shut down after minutes: another one of its pool may go on with it."""
    await work(local)
    job_id = await submit(queue, pools=pools(local={"max_wait": 100_000}))
    claim = await claim_one(local)
    for name in ("created", "since", "started"):
        await redis.hincrby(f"{queue.prefix}job:{job_id}", name, -150_000)  # type: ignore[misc]
    await submit(queue, pools=[Candidate("local")])
    await claim_one(local)
    await local.release(claim, BUSY, "interruptions")
    await work(burst)
    await redis.zadd(f"{queue.prefix}movable:local", {job_id: 0})
    await look(local)
    assert await pool_of(queue, job_id) == "local"
    await redis.hincrby(f"{queue.prefix}job:{job_id}", "since", -150_000)  # type: ignore[misc]
    await redis.zadd(f"{queue.prefix}movable:local", {job_id: 0})
    await look(local)
    assert await pool_of(queue, job_id) == "burst"


async def test_a_job_that_its_pool_put_off_comes_back(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """The upstream takes no calls for hours, and the first pool has a worker again."""
    await work(burst)
    job_id = await submit(queue, pools=pools())
    await burst.release(await claim_one(burst), BUSY, "interruptions", delay=3600)
    await work(local)
    await asyncio.sleep(1.1)
    await look(burst)
    assert await pool_of(queue, job_id) == "local"
    assert (await claim_one(local)).id == job_id


async def test_a_job_goes_back_to_a_pool_that_can_start_it(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """Rather than wait in one that is fine, too: as many as there are free slots."""
    await work(burst)
    await submit(queue, pools=[Candidate("burst")])
    await claim_one(burst)
    jobs = [await submit(queue, pools=pools()) for _ in range(3)]
    await work(local, slots=2)
    await asyncio.sleep(1.1)
    await look(burst)
    assert [await pool_of(queue, job_id) for job_id in jobs] == ["local", "local", "burst"]
    async with EventHub(queue) as hub, hub.follow(jobs[0]) as follower:
        assert (await follower.read())[-1].move == Move("burst", "preferred")


async def test_a_job_does_not_go_back_to_a_pool_that_is_too_slow(
    queue: JobQueue, redis: ArqRedis, local: JobQueue, burst: JobQueue
) -> None:
    """It has a free slot, and would not be done with the job in time."""
    await work(local)
    await work(burst)
    await measured(local, 100.0)
    job_id = await submit(queue, seconds=30, pools=pools())
    assert await pool_of(queue, job_id) == "burst"
    await redis.zadd(f"{queue.prefix}movable:burst", {job_id: 0})
    await look(burst)
    assert await pool_of(queue, job_id) == "burst"


async def test_a_pool_is_given_another_chance_by_a_job_that_comes(
    queue: JobQueue, redis: ArqRedis, local: JobQueue, burst: JobQueue
) -> None:
    """Not by jobs that wait elsewhere and stay there: whoever scales it would see no work."""
    await work(burst)
    both = pools(local={"start": 1000})
    await redis.hset(f"{queue.prefix}totals:local", "unserved", 1)  # type: ignore[misc]
    waiting = await submit(queue, pools=both[1:] + both[:1])
    assert await pool_of(queue, waiting) == "burst"
    await redis.zadd(f"{queue.prefix}movable:burst", {waiting: 0})
    await look(burst)
    assert await redis.hget(f"{queue.prefix}totals:local", "unserved") == b"1"  # type: ignore[misc]
    assert await pool_of(queue, await submit(queue, pools=both)) == "local"
    assert await redis.hget(f"{queue.prefix}totals:local", "unserved") != b"1"  # type: ignore[misc]


async def test_a_job_does_not_wait_for_a_pool_to_start_when_its_own_is_back(
    queue: JobQueue, local: JobQueue, burst: JobQueue
) -> None:
    """It moved to a pool whose workers were to come up, and they still are."""
    both = pools(local={"start": 1}, burst={"start": 60_000})
    job_id = await submit(queue, pools=both)
    await asyncio.sleep(0.01)
    await look(local)
    assert await pool_of(queue, job_id) == "burst"
    await work(local)
    await look(burst)
    assert await pool_of(queue, job_id) == "local"


async def test_a_job_that_was_put_off_goes_to_a_pool_that_is_late(
    queue: JobQueue, local: JobQueue, burst: JobQueue
) -> None:
    """Late is better than tomorrow, though no slot is free there."""
    await work(local)
    await submit(queue, pools=[Candidate("local")])
    await claim_one(local)
    await work(burst)
    job_id = await submit(queue, pools=pools(local={"max_wait": 10}, burst={"max_wait": 10}))
    if await pool_of(queue, job_id) == "local":
        await asyncio.sleep(1.1)
        await look(local)
    await burst.release(await claim_one(burst), BUSY, "interruptions", delay=3600)
    await asyncio.sleep(2.1)
    await look(burst)
    assert await pool_of(queue, job_id) == "local"


async def test_a_pool_that_was_scaled_to_zero_gets_its_first_job(
    queue: JobQueue, local: JobQueue, burst: JobQueue
) -> None:
    """Its last worker finished a job while it drained: nobody has waited for a worker since."""
    await work(local)
    await submit(queue, pools=[Candidate("local")])
    claim = await claim_one(local)
    await work(local, slots=0)
    await asyncio.sleep(0.05)
    await local.finish(claim, SUCCEEDED)
    await go_away(local)
    await work(burst)
    await asyncio.sleep(0.2)
    assert await pool_of(queue, await submit(queue, pools=pools(local={"start": 150}))) == "local"


async def test_a_clock_that_went_back_refuses_nobody(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    await work(burst)
    await redis.hset(f"{queue.prefix}totals:local", "unserved", 2**52)  # type: ignore[misc]
    assert await pool_of(queue, await submit(queue, pools=pools())) == "burst"
    assert await pool_of(queue, await submit(queue, pools=pools(local={"start": 1000}))) == "local"


async def test_many_looks_that_are_due_are_not_left_for_later(queue: JobQueue, local: JobQueue) -> None:
    await work(local)
    for _ in range(25):
        await submit(queue, pools=pools())
    await asyncio.sleep(1.1)
    _, due = await local.sweep()
    assert due == 0
    _, due = await local.sweep()
    assert due != 0


async def test_what_is_left_in_a_pool_that_nobody_names_ends(queue: JobQueue, redis: ArqRedis) -> None:
    """Gateways see to the queues that their settings do not know, too."""
    job_id = await submit(queue, seconds=0.05, pools=[Candidate("gone")])
    await asyncio.sleep(0.1)
    blobs = RedisBlobs(redis, queue.prefix)
    async with EventHub(queue) as hub, hub.follow(job_id, after=1) as follower:
        upkeep = asyncio.create_task(run_upkeep_of_others(queue, {"default"}, blobs, 0.0))
        while not (events := await follower.next(60)):
            pass
        assert [event.type for event in events] == ["expired"]
        upkeep.cancel()


async def test_a_deferred_job_stays_until_its_time(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    soon = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    job_id = await submit(queue, options={"not_before": soon}, pools=pools())
    await look(local, burst)
    assert (await queue.get(job_id)).state == JobState.QUEUED
    assert await pool_of(queue, job_id) == "local"


async def test_a_claim_tells_whether_the_job_may_go_elsewhere(queue: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    for choices in ([Candidate("burst")], [Candidate("burst", price=1, tenant_cap=9)], pools()):
        await submit(queue, pools=choices)
        assert (await claim_one(burst)).may_go_elsewhere == (len(choices) > 1)


async def test_a_job_of_one_pool_stays(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    job_id = await submit(queue, pools=[Candidate("local")])
    await look(local, burst)
    assert await pool_of(queue, job_id) == "local"


async def test_who_waits_for_a_job_keeps_it_when_it_moves(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    """And lets go of it there."""
    await work(burst)
    waiter = Waiter("caller", 60_000, 1)
    job_id = await submit(queue, waiter=waiter, pools=pools(local={"start": 1}))
    await asyncio.sleep(0.01)
    await look(local)
    await queue.wait_for(job_id, waiter)
    await look(burst)
    assert (await queue.get(job_id)).state == JobState.QUEUED
    await queue.leave(job_id, waiter)
    await asyncio.sleep(0.01)
    await look(burst)
    assert (await queue.get(job_id)).state == JobState.CANCELED


async def test_a_replay_goes_where_there_is_a_worker(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(local)
    job_id = await submit(queue, pools=pools())
    await queue.cancel(job_id)
    await go_away(local)
    await work(burst)
    await queue.replay(job_id, 60)
    assert await pool_of(queue, job_id) == "burst"


async def test_an_idempotency_key_finds_a_job_that_moved(queue: JobQueue, local: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    join = Join("key:acme:1", "idempotency", 60_000)
    job_id = await submit(queue, join=join, pools=pools(local={"start": 1}))
    await asyncio.sleep(0.01)
    await look(local)
    assert await submit(queue, join=join, pools=pools(), share=Share()) == job_id

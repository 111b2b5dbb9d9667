"""What calls in a pool with a price cost, and what bounds that."""

from datetime import UTC, datetime

import pytest
from arq.connections import ArqRedis

from img2img.errors import SpendCapReached
from img2img.jobs import JobState, Outcome
from img2img.queue import JobQueue
from img2img.queue_types import Candidate, Claim
from tests.days import keep_within_a_day
from tests.queue.calls import SUCCEEDED, claim_one, submit
from tests.queue.pools import BUSY, look, pool_of, pools, work


@pytest.fixture(autouse=True)
def _all_on_one_day() -> None:
    keep_within_a_day(5.0)


async def spent(redis: ArqRedis, account: str = "acme") -> tuple[int, int]:
    """What an account's jobs in `burst` came to today, and those of all accounts."""
    day = (datetime.now(UTC) - datetime(1970, 1, 1, tzinfo=UTC)).days
    own, every = await redis.hmget(f"img2img:{{0}}:spend:burst:{day}", [account, "*"])
    return int(own or 0), int(every or 0)


async def started(queue: JobQueue, burst: JobQueue, tenant_cap: int) -> Claim:
    """A claimed job of a pool in which a call costs 10."""
    await submit(queue, pools=[Candidate("burst", price=10, tenant_cap=tenant_cap)])
    return await claim_one(burst)


async def test_a_cap_bounds_what_goes_to_a_pool(
    queue: JobQueue, redis: ArqRedis, local: JobQueue, burst: JobQueue
) -> None:
    """Each tenant's, and that of all; what cannot go there waits where it is."""
    await work(burst)
    both = pools(burst={"price": 10, "cap": 50, "tenant_cap": 30})
    mine = [await pool_of(queue, await submit(queue, pools=both)) for _ in range(5)]
    others = [await pool_of(queue, await submit(queue, account="other", pools=both)) for _ in range(5)]
    assert mine == ["burst"] * 3 + ["local"] * 2
    assert others == ["burst"] * 2 + ["local"] * 3
    assert await spent(redis) == (30, 50)
    await look(local)
    assert (await local.stats()).queued == 5


async def test_where_every_pool_is_too_dear_a_job_is_refused(queue: JobQueue, burst: JobQueue) -> None:
    await work(burst)
    only = [Candidate("burst", price=10, tenant_cap=9)]
    with pytest.raises(SpendCapReached) as refused:
        await submit(queue, pools=only)
    assert 0 < refused.value.retry_after <= 24 * 3600


async def test_what_was_not_called_costs_nothing(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """Canceled, expired, moved away, or ended by an engine that made no call."""
    await work(burst)
    only = [Candidate("burst", price=10, tenant_cap=100)]
    canceled, failing = await submit(queue, pools=only), await submit(queue, pools=only)
    assert await spent(redis) == (20, 20)
    await queue.cancel(canceled)
    assert await spent(redis) == (10, 10)
    claim = await claim_one(burst)
    assert claim.id == failing
    await queue.cancel(failing)
    await burst.release(claim, BUSY, "interruptions")
    assert await spent(redis) == (0, 0)


async def test_a_call_that_made_no_picture_costs_nothing(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """Its price pays for the next call; what was said twice is paid once."""
    await work(burst)
    claim = await started(queue, burst, tenant_cap=100)
    for call in (1, 2):
        for _ in range(2):
            assert await burst.sent(claim, call, "retry") is None
        if call == 1:
            for _ in range(2):
                assert await burst.sent(claim, call, None) is None
    await burst.finish(claim, SUCCEEDED)
    assert await spent(redis) == (10, 10)


async def test_a_call_that_was_billed_for_no_picture_stays_paid(
    queue: JobQueue, redis: ArqRedis, burst: JobQueue
) -> None:
    """So that a cap bounds what useless pictures cost; it is off the record all the same."""
    await work(burst)
    claim = await started(queue, burst, tenant_cap=20)
    for spent_by_then in (10, 20):
        assert await burst.sent(claim, 1, "fail") is None
        for _ in range(2):
            assert await burst.sent(claim, 1, None, billed=True) is None
        await burst.release(claim, BUSY, "interruptions")
        assert await spent(redis) == (spent_by_then, spent_by_then)
        claim = await claim_one(burst)
    with pytest.raises(SpendCapReached):
        await burst.sent(claim, 1, "fail")


async def test_a_picture_made_without_a_call_is_paid_for(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """Machines that are rented have a price, too; what they do not bring to an end costs nothing."""
    await work(burst)
    for outcome, spent_by_then in ((SUCCEEDED, 10), (Outcome(state=JobState.FAILED, error=BUSY), 10)):
        await burst.finish(await started(queue, burst, tenant_cap=100), outcome)
        assert await spent(redis) == (spent_by_then, spent_by_then)


async def test_a_lost_call_stays_paid(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """The next one is paid anew, within the cap; without room for it none is made today."""
    await work(burst)
    claim = await started(queue, burst, tenant_cap=20)
    assert await burst.sent(claim, 1, "retry") is None
    await burst.release(claim, BUSY, "interruptions")
    claim = await claim_one(burst)
    assert await burst.sent(claim, 1, "retry") is None
    assert await spent(redis) == (20, 20)
    with pytest.raises(SpendCapReached):
        await burst.sent(claim, 2, "retry")
    await burst.release(claim, BUSY, "interruptions", delay=60)
    assert await spent(redis) == (20, 20)


async def test_what_was_reserved_yesterday_counts_on_the_day_of_the_call(
    queue: JobQueue, redis: ArqRedis, burst: JobQueue
) -> None:
    await work(burst)
    claim = await started(queue, burst, tenant_cap=10)
    pool, day, amount = (await redis.hget(f"{queue.prefix}job:{claim.id}", "reserved")).decode().split()  # type: ignore[misc]
    yesterday = f"{queue.prefix}spend:{pool}:{int(day) - 1}"
    await redis.hset(f"{queue.prefix}job:{claim.id}", "reserved", f"{pool} {int(day) - 1} {amount}")  # type: ignore[misc]
    await redis.rename(f"{queue.prefix}spend:{pool}:{day}", yesterday)
    assert await burst.sent(claim, 1, "retry") is None
    assert await spent(redis) == (10, 10)
    assert await redis.hget(yesterday, "acme") == b"0"  # type: ignore[misc]


async def test_a_replay_is_paid_anew(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """Or not made, when it would cost more than may be spent."""
    await work(burst)
    claim = await started(queue, burst, tenant_cap=20)
    for spent_by_now in (10, 20):
        await burst.sent(claim, 1, "fail")
        await burst.release(claim, BUSY, "failures")
        assert (await queue.get(claim.id)).state == JobState.FAILED
        assert await spent(redis) == (spent_by_now, spent_by_now)
        if spent_by_now == 10:
            await queue.replay(claim.id, 60)
            claim = await claim_one(burst)
    with pytest.raises(SpendCapReached):
        await queue.replay(claim.id, 60)
    assert (await queue.get(claim.id)).state == JobState.FAILED


async def test_a_late_word_about_an_earlier_call_changes_nothing(
    queue: JobQueue, redis: ArqRedis, burst: JobQueue
) -> None:
    await work(burst)
    claim = await started(queue, burst, tenant_cap=100)
    await burst.sent(claim, 1, "fail")
    await burst.sent(claim, 1, None)
    await burst.sent(claim, 2, "fail")
    await burst.sent(claim, 1, None)
    await burst.release(claim, BUSY, "interruptions")
    assert (await queue.get(claim.id)).state == JobState.FAILED
    assert await spent(redis) == (10, 10)


async def test_a_call_that_a_cancel_prevents_costs_nothing(queue: JobQueue, redis: ArqRedis, burst: JobQueue) -> None:
    """It was on record, the answer to that was lost, and meanwhile the job was canceled."""
    await work(burst)
    claim = await started(queue, burst, tenant_cap=100)
    await burst.sent(claim, 1, "fail")
    await queue.cancel(claim.id)
    assert await burst.sent(claim, 1, "fail") is not None
    await burst.finish(claim, Outcome(state=JobState.CANCELED))
    assert await spent(redis) == (0, 0)

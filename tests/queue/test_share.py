"""Whose job is next: shares by weight and seconds of work, and priority within a tenant."""

import itertools
from typing import Any

from arq.connections import ArqRedis

from img2img.jobs import Failure
from img2img.queue import JobQueue
from img2img.queue_types import Rules, Share
from tests.queue.calls import SUCCEEDED, claim_one, submit

LONG: dict[str, Any] = {"num_steps": 20}
SHORT: dict[str, Any] = {"num_steps": 5}
WHY = Failure("engine_failed", "x")


async def claimed_accounts(queue: JobQueue, count: int) -> list[str]:
    """The accounts of the next ``count`` jobs; none ends, so that no estimate changes."""
    return [(await claim_one(queue)).spec.account for _ in range(count)]


async def test_a_newcomer_is_next_behind_a_flood(queue: JobQueue) -> None:
    """However many jobs a tenant has queued, another one's first job is started next."""
    for _ in range(20):
        await submit(queue, account="flood")
    await claimed_accounts(queue, 3)
    await submit(queue, account="small")
    assert (await claimed_accounts(queue, 1)) == ["small"]


async def test_equal_tenants_take_turns(queue: JobQueue) -> None:
    for account, _ in itertools.product(("one", "two"), range(4)):
        await submit(queue, account=account)
    order = await claimed_accounts(queue, 8)
    for pair in zip(order[::2], order[1::2], strict=True):
        assert set(pair) == {"one", "two"}


async def test_a_weight_is_a_share(queue: JobQueue) -> None:
    """A tenant of weight three gets three jobs for each of the other's, while both have jobs."""
    for account, weight in (("heavy", 3.0), ("light", 1.0)):
        for _ in range(12):
            await submit(queue, account=account, share=Share(weight))
    assert (await claimed_accounts(queue, 12)).count("heavy") == 9


async def test_shares_are_seconds_not_jobs(queue: JobQueue) -> None:
    """Four jobs of five steps weigh as much as one of twenty."""
    for _ in range(10):
        await submit(queue, account="long", fields=LONG)
        await submit(queue, account="short", fields=SHORT)
    order = await claimed_accounts(queue, 10)
    assert order.count("short") == 8


async def test_leaving_and_coming_back_gains_nothing(queue: JobQueue) -> None:
    """A tenant that has had more than its share does not start afresh because its queue was empty for a moment."""
    for _ in range(6):
        await submit(queue, account="steady")
    await submit(queue, account="jumper", fields=LONG)
    order = []
    for _ in range(6):
        order += await claimed_accounts(queue, 1)
        if order[-1] == "jumper":
            await submit(queue, account="jumper")
    assert order.count("jumper") == 3


async def test_a_tenant_that_was_away_does_not_catch_up(queue: JobQueue) -> None:
    """What a tenant did not use while it had no jobs is not owed to it."""
    for _ in range(20):
        await submit(queue, account="steady")
    await claimed_accounts(queue, 10)
    for _ in range(10):
        await submit(queue, account="late")
    assert (await claimed_accounts(queue, 10)).count("late") in (5, 6)


async def test_tenants_that_come_together_keep_their_order(queue: JobQueue) -> None:
    """Nobody is behind later ones for the name of its account, and each is told how many are before it."""
    names = ["zoe", "mia", "ann", "yan", "bob"]
    ids = [await submit(queue, account=name) for name in names]
    assert [(await queue.get(job_id)).queue_position for job_id in ids] == [0, 1, 2, 3, 4]
    assert await claimed_accounts(queue, 3) == names[:3]
    await submit(queue, account="aaa")
    assert await claimed_accounts(queue, 3) == ["yan", "bob", "aaa"]


async def test_the_position_behind_very_many_tenants(queue: JobQueue) -> None:
    for number in range(250):
        await submit(queue, account=f"tenant-{number}")
    job = await queue.get(await submit(queue, account="last"))
    assert job.queue_position == 250


async def test_priority_counts_within_a_tenant(queue: JobQueue) -> None:
    """A high priority is no way past other tenants."""
    await submit(queue, account="one")
    await submit(queue, account="two")
    for _ in range(3):
        await submit(queue, account="one", options={"priority": 10})
    order = await claimed_accounts(queue, 4)
    assert order.count("two") == 1
    assert order.index("two") <= 1


async def test_low_priority_is_only_a_delay(redis: ArqRedis) -> None:
    """The head start of a priority is a time: later jobs of the highest one come after an old job of the lowest."""
    queue = JobQueue(redis, rules=Rules(priority_seconds=0.001))
    patient = await submit(queue, options={"priority": -10})
    claimed = []
    while patient not in claimed:
        await submit(queue, options={"priority": 10})
        claim = await claim_one(queue)
        claimed.append(claim.id)
        await queue.finish(claim, SUCCEEDED)
    assert len(claimed) < 500


async def test_sums_return_to_nothing(queue: JobQueue, redis: ArqRedis) -> None:
    """Every sum that shares and estimates rest on is back at zero when all jobs have ended, however they ended."""
    for number in range(12):
        await submit(queue, account=f"tenant-{number % 3}", fields={"num_steps": 1 + number})
    await queue.release(await claim_one(queue), WHY, "interruptions")
    await queue.release(await claim_one(queue), WHY, "failures", delay=60)
    assert (await queue.stats()).seconds > 0
    page = await queue.list_jobs("tenant-0")
    for job in page.jobs:
        await queue.cancel(job.id)
    while (await queue.stats()).queued:
        await queue.finish(await claim_one(queue), SUCCEEDED)
    for account in ("tenant-1", "tenant-2"):
        for job in (await queue.list_jobs(account)).jobs:
            await queue.cancel(job.id)
    totals = await redis.hgetall(f"{queue.prefix}totals:default")
    assert set(totals) <= {b"clock", b"engine", b"entry"}
    for index in ("tenants", "ready", "tenant"):
        assert await redis.keys(f"{queue.prefix}{index}:*") == []

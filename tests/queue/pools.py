"""What the tests of pools do again and again: `local` comes first, `burst` second."""

import asyncio
from collections.abc import Sequence
from typing import Any

from img2img.jobs import Failure
from img2img.queue import JobQueue
from img2img.queue_types import Candidate, WorkerInfo
from tests.queue.calls import LEASE, SUCCEEDED, claim_one, submit

BUSY = Failure("upstream_busy", "The upstream takes no call now")


async def work(queue: JobQueue, slots: int = 1) -> None:
    """Have a worker say that it lives."""
    info = WorkerInfo(f"at-{queue.name}", slots, "fake", "fake", "cpu", 256 * 256)
    await queue.beat(info, [], lease=LEASE, ttl=60)


async def go_away(queue: JobQueue) -> None:
    await queue.sign_off(f"at-{queue.name}")


async def measure(queue: JobQueue, seconds: float) -> None:
    """Let jobs be measured that run about ``seconds``."""
    for _ in range(3):
        await submit(queue)
        claim = await claim_one(queue)
        await asyncio.sleep(seconds)
        await queue.finish(claim, SUCCEEDED)


async def measured(queue: JobQueue, seconds: float) -> None:
    """Have it on record that jobs of any kind run ``seconds``."""
    sums = " ".join(str(value) for value in (10, 10 * 20, 10 * seconds, 10 * 20**2, 10 * 20 * seconds))
    redis: Any = queue.redis
    await redis.hset(f"{queue.prefix}service:{queue.name}:fake/fake", "*", sums)
    await redis.pexpire(f"{queue.prefix}service:{queue.name}:fake/fake", 60_000)
    await redis.hset(f"{queue.prefix}totals:{queue.name}", "engine", "fake/fake")


def pools(*, local: dict[str, Any] | None = None, burst: dict[str, Any] | None = None) -> Sequence[Candidate]:
    return Candidate("local", **(local or {})), Candidate("burst", **(burst or {}))


async def pool_of(queue: JobQueue, job_id: str) -> str:
    return (await queue.get(job_id)).pool


async def look(*queues: JobQueue) -> None:
    """What gateways do once a second or more often."""
    for queue in queues:
        await queue.sweep()

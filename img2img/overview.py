"""What every pool of a pools file does now, and what it has cost today."""

import msgspec
from arq.connections import ArqRedis

from img2img.pools import Pool, Pools
from img2img.queue import JobQueue
from img2img.spending import ALL, Spending


class PoolOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment: jobs by state, ``seconds`` of work that could begin, and amounts of this day (UTC).

    ``paused`` are those of the ``workers`` that take no jobs now, because a service that they call takes no calls.
    ``spent`` counts calls and what is reserved for calls to come; None where nothing costs anything. ``tenants`` has
    that of each account, without those that spent nothing.
    """

    pool: str
    engine: str
    model: str | None
    workers: int
    paused: int
    queued: int
    delayed: int
    running: int
    seconds: float
    spent: float | None
    spend_per_day: float | None
    tenant_spend_per_day: float | None
    tenants: dict[str, float]


async def overview(redis: ArqRedis, pools: Pools) -> list[PoolOverview]:
    """All pools, in the order of the file.

    Raises:
        Unavailable: the queue's server cannot be reached.
    """
    return [await _of(redis, pool) for pool in pools.by_name.values()]


async def _of(redis: ArqRedis, pool: Pool) -> PoolOverview:
    stats, spending = await JobQueue(redis, pool.name).stats(), Spending(redis)
    spent = await spending.of(pool.name, await spending.today()) if pool.is_priced else {}
    return PoolOverview(
        pool=pool.name,
        engine=pool.engine,
        model=pool.model,
        workers=len(stats.workers),
        paused=sum(worker.paused for worker in stats.workers),
        queued=stats.queued,
        delayed=stats.delayed,
        running=stats.running,
        seconds=stats.seconds,
        spent=spent.get(ALL, 0.0) if pool.is_priced else None,
        spend_per_day=pool.spend_per_day,
        tenant_spend_per_day=pool.tenant_spend_per_day,
        tenants={account: amount for account, amount in sorted(spent.items()) if amount and account != ALL},
    )

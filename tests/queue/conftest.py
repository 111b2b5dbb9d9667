"""A queue on an empty server that must be left tidy."""

from collections.abc import AsyncIterator
from typing import Final

import pytest
from arq.connections import ArqRedis

from img2img.queue import JobQueue
from img2img.queue_types import Rules
from img2img.server import open_redis

INDEXES: Final = (
    b"abandon:", b"delayed:", b"expiry:", b"leases:", b"movable:", b"quarantine:", b"ready:", b"rested:", b"slots:",
    b"stall:", b"startable:", b"suspects:", b"tenant:", b"tenants:", b"totals:", b"wake:", b"worker-info:", b"workers:",
)  # fmt: skip
NO_TTL: Final = -1


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[ArqRedis]:
    """An empty server; afterwards no key may be left without a time to live, but for the documented indexes."""
    async with open_redis(valkey_url) as connection:
        await connection.flushall()
        yield connection
        for key in await connection.keys("*"):
            name = key.partition(b"}:")[2]
            if (
                key.startswith(b"arq:queue:")
                or name in (b"fence", b"discard", b"discarding", b"queues")
                or name.startswith(INDEXES)
            ):
                continue
            # Some have gone since they were listed.
            assert await connection.pttl(key) != NO_TTL, f"{key!r} never expires"


@pytest.fixture
def queue(redis: ArqRedis) -> JobQueue:
    return JobQueue(redis, rules=Rules(attempts=2))


@pytest.fixture
def local(queue: JobQueue) -> JobQueue:
    return queue.sibling("local")


@pytest.fixture
def burst(queue: JobQueue) -> JobQueue:
    return queue.sibling("burst")

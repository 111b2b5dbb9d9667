"""arq as it is; ``BENCH_FAST`` polls every 10 ms and runs 100 jobs at once."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from arq import Worker, create_pool, func
from arq.connections import RedisSettings
from protocol import PAYLOAD, SLOTS, URL, Submit, job, produce

SERVER = RedisSettings.from_dsn(URL)
POLL = 0.01 if os.environ.get("BENCH_FAST") else 0.5
WORKER: dict[str, Any] = {"poll_delay": POLL, "max_jobs": SLOTS} if os.environ.get("BENCH_FAST") else {}


async def run(_: dict[str, Any], payload: str) -> str:
    return job(payload)


@asynccontextmanager
async def client() -> AsyncIterator[Submit]:
    pool = await create_pool(SERVER)

    async def submit() -> Any:
        submitted = await pool.enqueue_job("run", PAYLOAD)
        return lambda: submitted.result(poll_delay=POLL)

    yield submit
    await pool.aclose()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.set_event_loop(asyncio.new_event_loop())
        Worker(functions=[func(run, name="run")], redis_settings=SERVER, **WORKER).run()
    else:
        produce(client)

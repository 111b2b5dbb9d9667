"""streaq as it is, with as many jobs at once as the others."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from protocol import PAYLOAD, SLOTS, URL, Submit, job, produce
from streaq import Worker

worker = Worker(redis_url=URL, concurrency=SLOTS)


@worker.task
async def run(payload: str) -> str:
    return job(payload)


@asynccontextmanager
async def client() -> AsyncIterator[Submit]:
    async def submit() -> Any:
        submitted = await run.enqueue(PAYLOAD)
        return lambda: submitted.result(60)

    async with worker:
        yield submit


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker.run_sync()
    else:
        produce(client)

"""SAQ with 20 jobs at once (100 are no faster); results are polled, here every 10 ms, not 500."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
from protocol import PAYLOAD, THREADS, URL, Submit, job, produce
from saq import Queue, Worker


async def run(_: Any, *, payload: str) -> str:
    return job(payload)


@asynccontextmanager
async def client() -> AsyncIterator[Submit]:
    queue = Queue.from_url(URL)
    await queue.connect()

    async def submit() -> Any:
        # SAQ waits for results in the call that submits.
        if sys.argv[1] == "latency":
            await queue.apply("run", payload=PAYLOAD, poll_interval=0.01)
        else:
            await queue.enqueue("run", payload=PAYLOAD)
        return lambda: None

    yield submit
    await queue.disconnect()


async def work() -> None:
    await Worker(Queue.from_url(URL), functions=[("run", run)], concurrency=THREADS).start()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        uvloop.run(work())
    else:
        produce(client)

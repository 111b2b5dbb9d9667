"""taskiq-redis on a list, or with ``BENCH_STREAM`` on a stream; results are polled, here every 10 ms, not 200."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from protocol import PAYLOAD, SLOTS, URL, Submit, job, produce
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

Broker = RedisStreamBroker if os.environ.get("BENCH_STREAM") else ListQueueBroker
broker = Broker(URL).with_result_backend(RedisAsyncResultBackend(URL))
COMMAND = "taskiq worker with_taskiq:broker --workers 1 --log-level ERROR --max-async-tasks"


@broker.task(task_name="run")
async def run(payload: str) -> str:
    return job(payload)


@asynccontextmanager
async def client() -> AsyncIterator[Submit]:
    await broker.startup()

    async def submit() -> Any:
        submitted = await run.kiq(PAYLOAD)
        return lambda: submitted.wait_result(check_interval=0.01)

    yield submit
    await broker.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        command = [*COMMAND.split(), str(SLOTS)]
        os.chdir(Path(__file__).parent)
        os.execv(Path(sys.executable).with_name("taskiq"), command)
    else:
        produce(client)

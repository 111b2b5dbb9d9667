"""An engine that calls the stand-in for Cloudflare's API, and short ways to ask it for a picture."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from img2img.errors import JobError
from img2img.upstream import Rates, open_ledger
from tests.upstream.api import Api
from tests.upstream.calls import Call
from worker.engines.base import Output, Pictures, Progress, Task
from worker.engines.cloudflare import Account, CloudflareEngine, UpstreamOptions

TOKENS = {"acme": "token-of-acme", "other": "token-of-other"}
ACME, OTHER = (Account(name, token) for name, token in TOKENS.items())
REFUSED_TOKEN = Account("acme", "wrong-token")


@asynccontextmanager
async def opened(
    valkey_url: str, url: str, *accounts: Account, rates: Rates | None = None, **options: Any
) -> AsyncIterator[CloudflareEngine]:
    ledger = open_ledger(valkey_url, rates or Rates(new_day=0.0))  # so that a test says the same soon after 00:00 UTC
    async with CloudflareEngine(accounts or (ACME,), UpstreamOptions(url=url, **options), ledger) as engine:
        yield engine


def task_of(behaviour: str = "", **changes: Any) -> Task:
    fields: dict[str, Any] = {
        "prompt": f"a lion {behaviour and 'upstream:' + behaviour}".strip(),
        "negative_prompt": "",
        "width": 512,
        "height": 320,
        "num_steps": 8,
        "strength": 0.5,
        "guidance": 7.5,
        "seed": 1,
    }
    return Task(**{**fields, **changes})


async def outputs_of(engine: CloudflareEngine, task: Task, pictures: Pictures | None = None) -> list[Output]:
    return [output async for output in engine.generate(task, pictures or Pictures())]


async def failure_of(engine: CloudflareEngine, task: Task) -> tuple[JobError, list[Output]]:
    """What the task fails of, and what came before."""
    outputs: list[Output] = []

    async def work() -> None:
        async for output in engine.generate(task, Pictures()):
            outputs.append(output)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(JobError) as caught:
        await work()
    return caught.value, outputs


def words(outputs: list[Output]) -> list[str]:
    """The kinds of outputs, without progress."""
    return [type(output).__name__ for output in outputs if not isinstance(output, Progress)]


async def ended(call: Call, how: str) -> None:
    async with asyncio.timeout(60):
        while call.ended != how:  # noqa: ASYNC110 - another thread's record has no event to wait for
            await asyncio.sleep(0.005)


async def called(api: Api, count: int) -> None:
    async with asyncio.timeout(60):
        while len(api.calls) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

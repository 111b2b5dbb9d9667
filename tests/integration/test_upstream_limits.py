"""Many engines together send an upstream no more calls than it takes, in its own count."""

import asyncio
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Final

from img2img.upstream import ARRIVAL_SPREAD, Rates, open_ledger
from tests.upstream.pictures import task_of
from tests.upstream.running import UpstreamProcess
from worker.engines.base import Image, Pictures
from worker.engines.cloudflare import Account, CloudflareEngine, UpstreamOptions

ENGINES: Final = 20
JOBS_EACH: Final = 6
CALLS: Final = 30
SECONDS: Final = 1.0
WINDOWS: Final = ENGINES * JOBS_EACH / CALLS


async def test_window_after_window(valkey_url: str, tmp_path: Path) -> None:
    """All jobs come at once; the upstream's sliding count stays within its limit, over several of its windows."""
    upstream = UpstreamProcess(tmp_path / "upstream.log")
    try:
        upstream.set("limits", model=CALLS, model_seconds=SECONDS, token=10**6, token_seconds=300.0)
        await make_all(upstream.url, valkey_url)
        seen = upstream.limits()["accounts"]["acme"]
        calls = upstream.calls()
    finally:
        upstream.close()
    assert (seen["calls"], seen["refused"]) == (ENGINES * JOBS_EACH, 0)
    assert seen["peak"] <= CALLS
    assert calls[-1]["at"] - calls[0]["at"] > (WINDOWS - 1) * SECONDS


async def make_all(url: str, redis_url: str) -> None:
    """All jobs at once, each engine as a worker process of its own would have it."""
    rates = Rates(account_calls=CALLS, account_window=SECONDS + ARRIVAL_SPREAD, token_calls=10**6)
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                CloudflareEngine([Account("acme", "secret")], UpstreamOptions(url=url), open_ledger(redis_url, rates))
            )
            for _ in range(ENGINES)
        ]
        await asyncio.gather(*(make(engine, seed) for engine in engines for seed in range(JOBS_EACH)))


async def make(engine: CloudflareEngine, seed: int) -> None:
    """One picture."""
    task = task_of({"prompt": "a lion", "seed": seed, "width": 256, "height": 256})
    async with aclosing(engine.generate(task, Pictures())) as outputs:
        assert [output async for output in outputs if isinstance(output, Image)]

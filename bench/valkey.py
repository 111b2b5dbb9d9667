"""A Valkey server for one measurement, and a count of the commands that it gets."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from img2img.embedded import EmbeddedValkey
from tests.valkey import free_port

CACHE: Final = Path(__file__).resolve().parents[1] / ".cache" / "bench"
"""On the same disk as the checkout: what a sync costs counts, and a temporary folder may lie in memory."""


@asynccontextmanager
async def fresh_server(appendfsync: str) -> AsyncIterator[str]:
    """An empty server with an append-only file, synced ``always`` or ``everysec``; yields its URL (TCP, loopback)."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="data-") as folder:
        async with EmbeddedValkey(Path(folder), port=free_port()) as server:
            url = f"redis://127.0.0.1:{server.port}/0"
            async with Redis.from_url(url) as redis:
                await redis.config_set("appendfsync", appendfsync)
            yield url


async def commands_per_second(url: str, seconds: float) -> float:
    """Commands that clients send within ``seconds``; those that scripts call do not count."""
    async with Redis.from_url(url) as redis, redis.monitor() as monitor:
        count, until = 0, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    command = await monitor.next_command()
            except TimeoutError:
                break
            count += command["client_type"] != "lua"
    return count / seconds

"""The connection to Redis or Valkey: timeouts, retries, the start-up check and error translation."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ReadOnlyError, RedisError, TimeoutError

from img2img.errors import ConfigurationError, Unavailable

CONNECT_TIMEOUT: Final = 3.0
SOCKET_TIMEOUT: Final = 5.0
MAX_CONNECTIONS: Final = 128
PASSING_ERRORS: Final = (ConnectionError, TimeoutError, OSError, BusyLoadingError, ReadOnlyError)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the server's errors into ours.

    Raises:
        Unavailable: it cannot be reached, is loading, read-only or out of memory.
        CancelledError: the task was cancelled meanwhile. redis-py sends through ``asyncio.wait_for``, which
            before Python 3.12 loses a cancellation that comes just when the command has been sent.
    """
    task = asyncio.current_task()
    cancellations = 0 if task is None else task.cancelling()
    try:
        yield
        if task is not None and task.cancelling() > cancellations:
            raise asyncio.CancelledError
    except (RedisError, OSError) as exc:
        raise Unavailable(f"The queue server does not answer as it should ({type(exc).__name__}): try again") from exc


@asynccontextmanager
async def open_redis(url: str, *, block: float = 0.0) -> AsyncIterator[ArqRedis]:
    """Open a pool; ``block`` (seconds) is the longest blocking command that it will carry.

    Raises:
        ConfigurationError: the URL cannot be parsed.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            socket_timeout=SOCKET_TIMEOUT + block,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.02), 3),
            retry_on_error=[BusyLoadingError, ConnectionError, TimeoutError],
            health_check_interval=30,
        )
    except ValueError as exc:
        raise ConfigurationError(f"IMG2IMG_REDIS_URL: {exc}") from exc
    redis = ArqRedis(pool)
    try:
        yield redis
    finally:
        await redis.aclose()
        await pool.aclose()


async def check_server(redis: ArqRedis) -> None:
    """Refuse a server that may drop keys when its memory is full.

    Raises:
        ConfigurationError: its maxmemory-policy is not noeviction.
        Unavailable: it cannot be reached.
    """
    with translated():
        memory: dict[str, Any] = await redis.info("memory")
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(
            f"The server's maxmemory-policy is {policy!r} and would drop jobs: set it to noeviction"
        )


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, rounded up, so that a short time never becomes none."""
    return math.ceil(seconds * 1000)

"""The connection to Redis or Valkey: time limits, retries, the start-up check and error translation."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Final

import structlog
from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection, Connection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from img2img.address import connection_options
from img2img.errors import ConfigurationError, Unavailable

CALL_SECONDS: Final = 5.0
"""How long a call may take with all that belongs to it: a free connection, connecting, retries, the answer."""
CONNECT_SECONDS: Final = 3.0
START_SECONDS: Final = 30.0
"""How long a process waits for its server when it starts."""
START_PAUSE: Final = 0.5
MAX_CONNECTIONS: Final = 128

log = structlog.get_logger(__name__)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the server's errors into ours.

    Raises:
        Unavailable: it cannot be reached, is silent, loading, read-only, busy or out of memory.
    """
    try:
        yield
    except (RedisError, OSError) as exc:
        raise Unavailable(f"The queue server does not answer as it should ({type(exc).__name__}): try again") from exc


class Pool(BlockingConnectionPool):
    """redis-py repeats commands, and connecting, but not what it says first on a new connection; this does, too."""

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        ensure = super().ensure_connection
        await connection.retry.call_with_retry(lambda: ensure(connection), lambda _: connection.disconnect())

    async def leave_replica(self, error: Exception) -> None:
        """After the error of a master that is none any more: also close what idles there and would read old data."""
        if isinstance(error, ReadOnlyError):
            await self.disconnect(inuse_connections=False)


class TimedPipeline(Pipeline):
    """A pipeline whose execution ends within ``CALL_SECONDS``."""

    connection_pool: Pool

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        async with asyncio.timeout(CALL_SECONDS):
            return await super().execute(raise_on_error)

    async def _disconnect_raise_reset(self, conn: Connection, error: Exception) -> None:
        await self.connection_pool.leave_replica(error)
        await super()._disconnect_raise_reset(conn, error)


class TimedRedis(ArqRedis):
    """A client whose calls end in time; those that do not raise the builtin ``TimeoutError``.

    redis-py's own limits are for one read or write each, and multiply with its retries.
    """

    connection_pool: Pool

    async def execute_command(self, *args: Any, seconds: float = CALL_SECONDS, **options: Any) -> Any:
        """Run one command within ``seconds``; a blocking pop has its own timeout on top."""
        if args[0] == "BLPOP":
            seconds += float(args[-1])
        async with asyncio.timeout(seconds):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return TimedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def _disconnect_raise(self, conn: Connection, error: Exception) -> None:
        await self.connection_pool.leave_replica(error)
        await super()._disconnect_raise(conn, error)


@asynccontextmanager
async def open_redis(url: str) -> AsyncIterator[TimedRedis]:
    """Open a pool of connections; none is made before the first call.

    After a failover a connection finds its server again: each one connects anew, by name or through the sentinels,
    when it is lost or told that its server is read-only now.

    Raises:
        ConfigurationError: the URL is wrong.
    """
    options = connection_options(url)
    async with AsyncExitStack() as stack:
        if sentinels := options.get("sentinels"):
            await stack.enter_async_context(sentinels)
        pool = Pool(
            max_connections=MAX_CONNECTIONS,
            timeout=None,  # the call's own limit counts
            socket_connect_timeout=CONNECT_SECONDS,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.02), 3),
            retry_on_error=[BusyLoadingError, ConnectionError, ReadOnlyError, TimeoutError],
            **options,
        )
        stack.push_async_callback(pool.aclose)
        yield TimedRedis(pool)


async def check_server(redis: ArqRedis, patience: float = START_SECONDS) -> None:
    """Wait until the server answers, at most ``patience`` seconds; refuse one that may drop jobs.

    Raises:
        ConfigurationError: it does not let us in, or its maxmemory-policy is not noeviction.
        Unavailable: it did not answer in time.
    """
    info = await _first_answer(redis, patience)
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(
            f"The server's maxmemory-policy is {policy!r} and would drop jobs: set it to noeviction"
        )
    if info.get("aof_enabled") == 0:
        log.warning(
            "queue_server_forgets", remedy="accepted jobs are lost when the server restarts: set its appendonly to yes"
        )


async def _first_answer(redis: ArqRedis, patience: float) -> dict[str, Any]:
    """What the server says of itself. Only INFO is asked: managed servers forbid more."""
    deadline = asyncio.get_running_loop().time() + patience
    told = False
    while True:
        try:
            with translated():
                info: dict[str, Any] = await redis.info()
            return info
        except Unavailable as exc:
            reason = exc.__cause__
            if isinstance(reason, AuthenticationError | NoPermissionError):
                raise ConfigurationError(
                    f"The queue server does not let us in: check user and password in IMG2IMG_REDIS_URL: {reason}"
                ) from exc
            if asyncio.get_running_loop().time() >= deadline:
                raise Unavailable(
                    f"The queue server has not answered for {patience:g} s: check that it runs and "
                    f"IMG2IMG_REDIS_URL: {reason!r}"
                ) from exc
            if not told:
                told = True
                log.warning("waiting_for_queue_server", seconds=patience, reason=repr(reason))
        await asyncio.sleep(START_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, rounded up, so that a short time never becomes none."""
    return math.ceil(seconds * 1000)

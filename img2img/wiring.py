"""Settings to opened parts, in one async context manager; closed in reverse order."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from img2img.blobs import BlobStore, open_blobs
from img2img.queue import JobQueue
from img2img.queue_types import Rules
from img2img.server import check_server, open_redis
from img2img.settings import Settings


class Parts(msgspec.Struct, frozen=True):
    """What gateway and worker share; open for as long as the context manager is."""

    settings: Settings
    queue: JobQueue
    blobs: BlobStore


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[Parts]:
    """Open queue and blobs.

    Raises:
        ConfigurationError: a setting is wrong, or the server would drop keys.
        Unavailable: the server did not answer for half a minute, or the blob store cannot be reached.
    """
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(open_redis(settings.redis_url))
        await check_server(redis)
        rules = Rules(
            attempts=settings.attempts,
            crash_limit=settings.crash_limit,
            priority_seconds=settings.priority_seconds,
            max_queued=settings.max_queued,
            refuse_late=settings.refuse_late,
        )
        queue = JobQueue(redis, settings.queue, rules)
        blobs = await stack.enter_async_context(open_blobs(settings.blobs, redis, queue.prefix))
        yield Parts(settings, queue, blobs)

"""The end of calls that wait when the gateway is told to stop: an answer that asks for a retry, before the limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import uuid_utils

from img2img.errors import Unavailable
from img2img.queue import JobQueue
from img2img.queue_types import Waiter
from img2img.server import milliseconds
from img2img.settings import Settings

ANSWER_SECONDS: Final = 1.0
"""What is left of the drain limit for the answers to go out; a fifth of it at most."""


class Drain:
    """One per process, shared by its front ends."""

    def __init__(self, queue: JobQueue, settings: Settings) -> None:
        self._queue = queue
        self._limit = settings.drain_timeout
        self._grace = settings.retry_grace
        self._end: float | None = None
        self._waits: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """From now on whoever waits has until shortly before the drain limit."""
        margin = min(ANSWER_SECONDS, self._limit / 5)
        self._end = asyncio.get_running_loop().time() + self._limit - margin
        for wait in self._waits:
            wait.reschedule(self._end)

    @asynccontextmanager
    async def bound(self, job_id: str | None = None) -> AsyncIterator[None]:
        """Let the block take no longer than the process may; ``job_id`` then lives on for the retry's grace.

        Raises:
            Unavailable: the process ends before the block would have.
        """
        wait = asyncio.timeout_at(self._end)
        self._waits.add(wait)
        try:
            async with wait:
                yield
        except TimeoutError as exc:
            if not wait.expired():
                raise
            if job_id is not None:
                await self._queue.wait_for(job_id, Waiter(uuid_utils.uuid7().hex, milliseconds(self._grace), 0))
            raise Unavailable("This gateway is shutting down: send the same request again") from exc
        finally:
            self._waits.discard(wait)

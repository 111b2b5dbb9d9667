"""A job's numbered event log, and the hub through which one process follows many jobs.

The log is a stream per job, written only by the queue's scripts. Pub/sub is nothing but a doorbell: each ring
makes the follower read on from the last sequence number it has, so a lost ring, a coalesced ring or a
reconnect can never lose or double an event.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

import msgspec
import structlog
from redis.asyncio.client import PubSub

from img2img.errors import Unavailable
from img2img.jobs import JobEvent
from img2img.queue import JobQueue
from img2img.server import translated

CATCH_UP_SECONDS: Final = 15.0
"""A follower looks again after this long even without a ring."""
READ_LIMIT: Final = 256
READ_SECONDS: Final = 10.0
RECONNECT_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


class Follower:
    """One watcher of one job: an endless iterator over its events, in order, without gaps."""

    def __init__(self, queue: JobQueue, job_id: str, after: int) -> None:
        self._queue = queue
        self._job_id = job_id
        self._after = after
        self._bell = asyncio.Event()

    def ring(self) -> None:
        self._bell.set()

    async def read(self) -> list[JobEvent]:
        """The events that are already there, after the last one returned.

        Raises:
            Unavailable: the server cannot be reached.
        """
        self._bell.clear()
        with translated():
            entries = await self._queue.redis.xrange(
                self._queue.events_key(self._job_id), min=f"({self._after}-0", count=READ_LIMIT
            )
        events = [_event(entry_id, fields) for entry_id, fields in entries]
        if events:
            self._after = events[-1].seq
        return events

    async def next(self, timeout: float) -> list[JobEvent]:
        """Wait for a ring, up to ``timeout`` seconds, and read; may be empty, so callers loop.

        Raises:
            Unavailable: the server cannot be reached.
        """
        try:
            async with asyncio.timeout(min(timeout, CATCH_UP_SECONDS)):
                await self._bell.wait()
        except TimeoutError:
            pass
        return await self.read()


class EventHub:
    """Follows any number of jobs over one subscription."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._followers: dict[str, set[Follower]] = {}
        self._pubsub: PubSub = queue.redis.pubsub()
        self._reader: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read_bells(), name="event-hub")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Follower]:
        """Follow a job from sequence number ``after`` on.

        The server's word that the bell is in place rings it too, so that what happened before is read.

        Raises:
            Unavailable: the server cannot be reached.
        """
        follower = Follower(self._queue, job_id, after)
        channel = self._queue.bell(job_id)
        followers = self._followers.setdefault(channel, set())
        followers.add(follower)
        try:
            if len(followers) == 1:
                await self._subscribe(channel)
            else:
                follower.ring()
            yield follower
        finally:
            followers.discard(follower)
            if not followers and self._followers.get(channel) is followers:
                del self._followers[channel]
                await self._unsubscribe(channel)

    def ring_all(self) -> None:
        """Make every follower look up, as before a shutdown."""
        for followers in self._followers.values():
            for follower in followers:
                follower.ring()

    async def _subscribe(self, channel: str) -> None:
        with translated():
            await self._pubsub.subscribe(channel)
        self._subscribed.set()

    async def _unsubscribe(self, channel: str) -> None:
        try:
            with translated():
                await self._pubsub.unsubscribe(channel)
        except Unavailable:
            log.debug("unsubscribe_failed", channel=channel)

    async def _read_bells(self) -> None:
        await self._subscribed.wait()
        while True:
            try:
                with translated():
                    message = await self._pubsub.get_message(timeout=READ_SECONDS)
            except Unavailable as exc:
                # The next read reconnects and subscribes again; the server's confirmations ring every bell.
                log.warning("event_hub_reconnects", error=str(exc))
                await asyncio.sleep(RECONNECT_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
                continue
            if message is not None and message["type"] in ("message", "subscribe"):
                for follower in tuple(self._followers.get(message["channel"].decode(), ())):
                    follower.ring()


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> JobEvent:
    return JobEvent(
        seq=int(entry_id.partition(b"-")[0]),
        type=fields[b"type"].decode(),
        at=int(fields[b"at"]),
        data=msgspec.json.decode(fields[b"data"], type=dict[str, object]),
    )

"""A job's numbered event log, and the hub through which one process follows many jobs.

The log is a list per job, written only by the queue's scripts: an event's number is its place. Pub/sub is nothing but
a doorbell: each ring makes the follower read on from the last number it has, so a lost ring, a coalesced ring or a
reconnect can never lose or double an event.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from img2img.errors import Unavailable
from img2img.jobs import JobEvent
from img2img.queue import JobQueue
from img2img.server import CALL_SECONDS, translated

CATCH_UP_SECONDS: Final = 15.0
"""A follower looks again after this long even without a ring."""
READ_LIMIT: Final = 256
READ_SECONDS: Final = 10.0
"""A connection that is silent for this long is asked whether it lives, and given up after as long again."""
RECONNECT_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


class _Written(msgspec.Struct, frozen=True):
    """An event as the scripts write it."""

    type: str
    at: int
    data: dict[str, object]


class Follower:
    """One watcher of one job: an endless iterator over its events, in order, without gaps."""

    def __init__(self, queue: JobQueue, job_id: str, after: int) -> None:
        self._queue = queue
        self._job_id = job_id
        self._after = after
        self._bell = asyncio.Event()
        self._deaf = False

    def ring(self) -> None:
        self._bell.set()

    def deafen(self) -> None:
        """No bell will ring any more: whoever waits, or asks again, gets an error."""
        self._deaf = True
        self._bell.set()

    async def read(self) -> list[JobEvent]:
        """The events that are already there, after the last one returned.

        Raises:
            Unavailable: the server cannot be reached.
        """
        if self._deaf:
            raise Unavailable("This gateway no longer hears of jobs and is about to end: try again")
        self._bell.clear()
        with translated():
            entries: list[bytes] = await self._queue.redis.lrange(  # type: ignore[misc]
                self._queue.events_key(self._job_id), self._after, self._after + READ_LIMIT - 1
            )
        events = [_event(number, entry) for number, entry in enumerate(entries, self._after + 1)]
        if events:
            self._after = events[-1].seq
        if len(events) == READ_LIMIT or self._deaf:
            self._bell.set()
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
    """Follows any number of jobs over one connection, which is touched by the hub's own task only.

    Followers merely say what they want to hear of; the task subscribes to that, connects again after a loss, and
    lets the server's confirmations ring. An unexpected end of the task cancels the block, so that the process ends
    instead of living on deaf.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._followers: dict[str, set[Follower]] = {}
        self._asked: set[str] = set()
        """Channels that this connection was told to hear."""
        self._heard: set[str] = set()
        """Those of them that the server has confirmed."""
        self._altered: set[str] = set()
        """Those that have got their first follower, or lost their last one, since the server was last told."""
        self._changed = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._owner: asyncio.Task[None] | None = None
        self._failed = False
        self._closing = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._owner = self._group.create_task(self._own(), name="event-hub")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failed:
            await self._group.__aexit__(kind, error, trace)
            return
        self._closing = True
        if self._owner is not None:
            self._owner.cancel()
        # The block's own error is not the group's: it leaves as it is.
        await self._group.__aexit__(None, None, None)

    @asynccontextmanager
    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Follower]:
        """Follow a job from sequence number ``after`` on.

        The server's word that the bell is in place rings it too, so that what happened before is read.

        Raises:
            Unavailable: the hub has failed.
        """
        follower = Follower(self._queue, job_id, after)
        channel = self._queue.bell(job_id)
        followers = self._followers.setdefault(channel, set())
        if not followers:
            self._alter(channel)
        followers.add(follower)
        if self._failed:
            follower.deafen()
        elif channel in self._heard:
            follower.ring()
        try:
            yield follower
        finally:
            followers.discard(follower)
            if not followers and self._followers.get(channel) is followers:
                del self._followers[channel]
                self._alter(channel)

    def _alter(self, channel: str) -> None:
        self._altered.add(channel)
        self._changed.set()

    def ring_all(self) -> None:
        """Make every follower look up, as before a shutdown."""
        for followers in self._followers.values():
            for follower in followers:
                follower.ring()

    async def _own(self) -> None:
        try:
            # Not for ever: a task group that fails while its own task is cancelled swallows the cancellation.
            while not self._closing:
                try:
                    await self._connected()
                except* Unavailable as group:
                    # The next connection subscribes again; the server's confirmations ring every bell.
                    log.warning("event_hub_reconnects", error=str(group.exceptions[0]))
                await asyncio.sleep(RECONNECT_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
        except Exception:
            self._failed = True
            log.exception("event_hub_failed")
            for followers in self._followers.values():
                for follower in followers:
                    follower.deafen()
            raise

    async def _connected(self) -> None:
        """Subscribe and listen over one connection until it is lost.

        It is not the pool's, and has none of redis-py's retries: those would connect again in the middle of
        somebody else's read.

        Raises:
            Unavailable: always, alone or in a group.
        """
        pool = self._queue.redis.connection_pool
        own = {"retry": Retry(NoBackoff(), 0), "retry_on_error": []}
        connection: Any = pool.connection_class(**pool.connection_kwargs | own)
        self._asked, self._heard, self._altered = set(), set(), set(self._followers)
        self._changed.set()
        try:
            with translated():
                async with asyncio.timeout(CALL_SECONDS):
                    await connection.connect()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._subscribe(connection), name="event-hub-orders")
                group.create_task(self._listen(connection), name="event-hub-bells")
        finally:
            self._heard = set()
            with suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: Any) -> None:
        """Make the connection hear what is followed, and nothing else."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            altered, self._altered = self._altered, set()
            wanted = {channel for channel in altered if channel in self._followers}
            new, old = wanted - self._asked, (altered - wanted) & self._asked
            self._asked |= new
            self._asked -= old
            self._heard -= old
            with translated():
                if old:
                    await connection.send_command("UNSUBSCRIBE", *old)
                if new:
                    await connection.send_command("SUBSCRIBE", *new)

    async def _listen(self, connection: Any) -> None:
        silent = False
        while True:
            with translated():
                answer = await connection.read_response(
                    timeout=READ_SECONDS, disconnect_on_error=False, push_request=True
                )
                if answer is None and not silent:
                    await connection.send_command("PING")
            if answer is None and silent:
                raise Unavailable(f"The queue server has been silent for {2 * READ_SECONDS:g} s")
            silent = answer is None
            if not isinstance(answer, list) or answer[0] not in (b"message", b"subscribe"):
                continue
            channel = answer[1].decode()
            if answer[0] == b"subscribe" and channel in self._asked:
                self._heard.add(channel)
            for follower in tuple(self._followers.get(channel, ())):
                follower.ring()


def _event(number: int, entry: bytes) -> JobEvent:
    """The event at place ``number`` of a log."""
    written = msgspec.json.decode(entry, type=_Written)
    return JobEvent(seq=number, type=written.type, at=written.at, data=written.data)

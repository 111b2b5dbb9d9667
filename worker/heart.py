"""The worker's beat, in a thread of its own: leases stay alive while the worker's event loop is held up.

Only the interpreter itself standing still (native code that never lets go of it) silences the heart; then the
worker's leases run out.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Self

import msgspec
import structlog

from img2img.errors import Unavailable
from img2img.jobs import StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim, WorkerInfo
from img2img.server import open_redis
from img2img.settings import Settings

RETRY_SECONDS: Final = 0.5

log = structlog.get_logger(__name__)


class Heart:
    """Beats while it is open. ``held`` are the claims to keep alive: replace the tuple when they change.

    What it says of the worker is ``info``, with the slots that ``tell_slots`` was told last.
    ``is_heard`` says whether the last beat got through; any thread may read it.
    ``tell`` is called in the loop that opened it, with the fences whose jobs must stop and why.
    """

    def __init__(
        self, queue: str, info: WorkerInfo, settings: Settings, tell: Callable[[dict[int, StopReason]], None]
    ) -> None:
        self.held: tuple[Claim, ...] = ()
        self.is_heard = False
        self._queue_name = queue
        self._info = info
        self._slots = info.slots
        self._is_draining = False
        self._settings = settings
        self._tell = tell
        # A try that fails, a pause and the next try fit between a beat and the end of the lease.
        self._patience = min(settings.beat, (settings.lease - settings.beat) / 3)
        self._poke = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._owner = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._owner.create_future()
        self._loop = loop = asyncio.new_event_loop()
        self._beats = loop.create_task(self._beat_forever(), name="beat")
        self._thread = threading.Thread(target=self._run, args=(loop,), name="heart", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        await asyncio.wait({self._ended})
        self._thread.join()

    async def beating(self) -> None:
        """Wait for its end; raises what it died of."""
        await asyncio.shield(self._ended)

    def tell_slots(self, slots: int) -> None:
        """Say with every beat that the worker runs so many jobs at once; at once if that is none, or some again."""
        turned = (slots == 0) != (self._slots == 0)
        self._slots = slots
        if turned:
            self.beat_now()

    def drain(self) -> None:
        """Say with every beat, from now on and at once, that the worker takes no more jobs."""
        self._is_draining = True
        self.beat_now()

    def beat_now(self) -> None:
        """Do not wait for the time of the next beat."""
        _send(self._loop, self._poke.set)

    def stop(self) -> None:
        """Beat no more; from any thread, as often as wanted."""
        _send(self._loop, self._cancel)

    def _cancel(self) -> None:
        self._beats.cancel()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        error: BaseException | None = None
        try:
            loop.run_until_complete(self._beats)
        except asyncio.CancelledError:
            pass
        except BaseException as exc:  # whatever it is, the worker goes down with it
            error = exc
        finally:
            loop.close()
            _send(self._owner, self._end, error)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # seen: a worker that is already on its way out asks no more

    async def _beat_forever(self) -> None:
        pause = 0.0
        async with open_redis(self._settings.redis_url) as redis:
            queue = JobQueue(redis, self._queue_name)
            while True:
                await self._sleep(pause)
                began = time.monotonic()
                try:
                    async with asyncio.timeout(self._patience):
                        await self._beat(queue)
                except (Unavailable, TimeoutError) as exc:
                    self.is_heard = False
                    log.warning("beat_failed", error=repr(exc))
                    pause = min(RETRY_SECONDS * random.uniform(0.5, 1.5), self._patience)  # noqa: S311
                else:
                    self.is_heard = True
                    pause = self._settings.beat - (time.monotonic() - began)

    async def _beat(self, queue: JobQueue) -> None:
        lease, is_draining = self._settings.lease, self._is_draining
        slots = 0 if is_draining else self._slots  # read once: the worker's thread may write it at any time
        info = msgspec.structs.replace(self._info, slots=slots, paused=slots == 0 and not is_draining)
        if stops := await queue.beat(info, self.held, lease=lease, ttl=2 * lease):
            _send(self._owner, self._tell, stops)

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poke.wait()
        self._poke.clear()


def _send(loop: asyncio.AbstractEventLoop | None, call: Callable[..., object], *arguments: Any) -> None:
    """Call something in a loop of another thread, unless that loop has not begun or has ended."""
    if loop is not None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(call, *arguments)

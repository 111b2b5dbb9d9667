"""Callers who wait for jobs: how they learn of the end, and how a job ends that nobody waits for any more."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import uuid_utils

from img2img.errors import Img2ImgError, WaitTimeout
from img2img.events import READ_LIMIT, EventHub, Follower
from img2img.jobs import JobEvent, Outcome
from img2img.queue import JobQueue
from img2img.queue_types import Waiter
from img2img.server import milliseconds

WAITER_TTL: Final = 9.0


class Attendance:
    """A caller's wait for one job."""

    def __init__(self, job_id: str, hub: EventHub, attended: list[str]) -> None:
        self.job_id = job_id
        self._hub = hub
        self._attended = attended

    async def outcome(self, timeout: float) -> Outcome:
        """How the job ended.

        Raises:
            WaitTimeout: not done within ``timeout`` seconds.
        """
        async with self._hub.follow(self.job_id) as follower:
            event = await end_of(follower, timeout)
        if event is None:
            raise WaitTimeout(
                f"The job did not finish within {timeout:g} s: send the same request again to go on waiting for it"
            )
        self._attended.clear()  # nothing is left to leave
        return msgspec.convert(event.data, Outcome)


async def end_of(follower: Follower, timeout: float, given_up: Callable[[], bool] = bool) -> JobEvent | None:
    """The terminal event with which the job's log ends; None after ``timeout`` seconds, or when ``given_up()``.

    A log goes on after a terminal event when its job is replayed: only the last one counts.
    """
    now = asyncio.get_running_loop().time
    deadline, last = now() + timeout, None
    while not given_up() and (left := deadline - now()) > 0:
        events = await follower.next(left)
        last = events[-1] if events else last
        if last is not None and last.is_terminal and len(events) < READ_LIMIT:
            return last
    return None


@asynccontextmanager
async def waiting(queue: JobQueue, job_id: str, grace: float) -> AsyncIterator[tuple[Waiter, list[str]]]:
    """A waiter that renews its interest in the jobs on its list (at first ``job_id``), and leaves them at last."""
    waiter = Waiter(uuid_utils.uuid7().hex, milliseconds(WAITER_TTL), milliseconds(grace))
    attended = [job_id]
    renewal = asyncio.create_task(_renew(queue, waiter, attended), name=f"waiter-{waiter.id}")
    try:
        yield waiter, attended
    finally:
        renewal.cancel()
        # Shielded: the caller is often gone already, and its job must not run for nobody.
        await asyncio.shield(_leave(queue, waiter, attended))


async def _renew(queue: JobQueue, waiter: Waiter, attended: list[str]) -> None:
    """Every third of its time; a try that fails or hangs leaves room for others before that is up."""
    pause = WAITER_TTL / 3
    while True:
        await asyncio.sleep(pause)
        pause = WAITER_TTL / 3
        for job_id in attended:
            try:
                async with asyncio.timeout(WAITER_TTL / 6):
                    await queue.wait_for(job_id, waiter)
            except (Img2ImgError, TimeoutError):
                pause = WAITER_TTL / 18


async def _leave(queue: JobQueue, waiter: Waiter, attended: list[str]) -> None:
    for job_id in attended:
        try:
            await queue.leave(job_id, waiter)
        except Img2ImgError:
            continue

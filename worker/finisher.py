"""Writes the outcomes of jobs: those that end while one write is under way go together in the next."""

import asyncio

import msgspec

from img2img.errors import LeaseLost, Unavailable
from img2img.jobs import JobState, Outcome
from img2img.queue import Claim, JobQueue


class Finisher:
    """One per worker. A job that ends alone is written at once; none waits for others to join it."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._waiting: list[tuple[Claim, JobState, bytes]] = []
        self._written: list[asyncio.Future[bool | Unavailable]] = []
        self._writing: asyncio.Task[None] | None = None

    async def finish(self, claim: Claim, outcome: Outcome) -> None:
        """End the job; safe to repeat.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
            Unavailable: the server cannot be reached; it may have been written or not.
        """
        written: asyncio.Future[bool | Unavailable] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, outcome.state, msgspec.json.encode(outcome)))
        self._written.append(written)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="finisher")
        done = await written
        if isinstance(done, Unavailable):
            raise done
        if not done:
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting, futures, self._written = self._waiting, [], self._written, []
                for written, done in zip(futures, await self._answers(batch), strict=True):
                    if not written.done():
                        written.set_result(done)
        finally:
            self._writing = None

    async def _answers(self, batch: list[tuple[Claim, JobState, bytes]]) -> list[bool | Unavailable]:
        try:
            return await self._queue.finish_all(batch)
        except (Unavailable, TimeoutError) as exc:
            return [Unavailable(str(exc))] * len(batch)

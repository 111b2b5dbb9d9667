"""Writes the outcomes of jobs: those that end while one write is under way go together in the next."""

import asyncio

from img2img.errors import LeaseLost
from img2img.jobs import Outcome
from img2img.queue import Claim, JobQueue


class Finisher:
    """One per worker. A job that ends alone is written at once; none waits for others to join it."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._waiting: list[tuple[Claim, Outcome, asyncio.Future[bool]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def finish(self, claim: Claim, outcome: Outcome) -> None:
        """End the job; safe to repeat.

        Raises:
            LeaseLost: somebody else holds the job now; nothing was written.
            Unavailable: the server cannot be reached; it may have been written or not.
        """
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((claim, outcome, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="finisher")
        if not await written:
            raise LeaseLost(f"Job {claim.id} is no longer held under fence {claim.fence}")

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    done = await self._queue.finish_all([(claim, outcome) for claim, outcome, _ in batch])
                except Exception as exc:
                    for _, _, written in batch:
                        if not written.done():
                            written.set_exception(exc)
                else:
                    for (_, _, written), answer in zip(batch, done, strict=True):
                        if not written.done():
                            written.set_result(answer)
        finally:
            self._writing = None

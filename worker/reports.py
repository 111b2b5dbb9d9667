"""What a running attempt tells the server: progress, previews, checkpoints. The work never waits for it."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Self, TypeVar

import msgspec
import structlog

from img2img.blobs import BlobStore
from img2img.errors import Unavailable
from img2img.jobs import Running, StopReason, StoredCheckpoint
from img2img.queue import JobQueue
from img2img.server import milliseconds
from img2img.settings import Settings
from worker.attempt import Attempt
from worker.engines.base import Checkpoint, Preview, Progress
from worker.images import encode_preview

UNRECORDED_SECONDS: Final = 120.0
"""How long a stored checkpoint lives that no record names: its worker died in between, or the job has ended."""
KEPT_AFTER_DEADLINE: Final = 600.0
"""Seconds; longer than it takes to notice that a deadline has passed."""
T = TypeVar("T")

log = structlog.get_logger(__name__)


class Outbox(Generic[T]):
    """Sends one thing at a time. What is offered meanwhile waits, and gives its place to what is offered after it."""

    def __init__(self, name: str, send: Callable[[T], Awaitable[None]]) -> None:
        self._name = name
        self._send = send
        self._waiting: list[T] = []
        self._sending: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self._sending is not None and not self._sending.done()

    def offer(self, item: T) -> None:
        if self.is_busy:
            self._waiting[:] = [item]
        else:
            self._sending = asyncio.create_task(self._run(item), name=self._name)

    async def drain(self) -> None:
        """Wait until everything is sent."""
        if self._sending is not None:
            await asyncio.wait({self._sending})

    async def close(self, *, give_up: bool) -> None:
        """Send nothing more; what is under way is waited for, or given up, as it is when the wait is cancelled."""
        self._waiting.clear()
        if self._sending is None:
            return
        if give_up:
            self._sending.cancel()
        try:
            await self.drain()
        finally:
            self._sending.cancel()

    async def _run(self, item: T) -> None:
        await self._send(item)
        while self._waiting:
            await self._send(self._waiting.pop())


class Throttle:
    """Lets something happen at most once in ``interval`` seconds; ``last`` is when it did (monotonic clock)."""

    def __init__(self, interval: float, last: float = -math.inf) -> None:
        self._interval = interval
        self._last = last

    def allows(self) -> bool:
        """Whether it may happen now, as it then does."""
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True


class Reports:
    """Sends an attempt's progress, previews and checkpoints while the block is open.

    A job that is done before the first progress interval, and shows no previews, costs the server nothing.
    """

    def __init__(self, queue: JobQueue, blobs: BlobStore, attempt: Attempt, settings: Settings) -> None:
        self._queue = queue
        self._blobs = blobs
        self._attempt = attempt
        job_id = attempt.claim.id
        self._progress = Outbox(f"report-{job_id}", self._send_progress)
        self._progress_due = Throttle(settings.progress_interval, time.monotonic())
        self._previews = Outbox(f"preview-{job_id}", self._send_preview)
        self._preview_due = Throttle(settings.preview_interval)
        self._checkpoints = Outbox(f"checkpoint-{job_id}", self._store_checkpoint)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever interrupts the work does not wait for a silent server, and work that is done needs no checkpoint.
        await asyncio.gather(
            self._checkpoints.close(give_up=True),
            self._previews.close(give_up=kind is not None),
            self._progress.close(give_up=kind is not None),
        )

    def progress(self, progress: Progress) -> None:
        """Note where the job is, and send it unless that would be too soon."""
        attempt = self._attempt
        attempt.running = msgspec.structs.replace(
            attempt.running, stage=progress.stage, step=progress.step, steps=progress.steps
        )
        if self._progress_due.allows():
            self._progress.offer(attempt.running)

    def preview(self, preview: Preview) -> None:
        """Show it, unless that would be too soon."""
        if self._preview_due.allows():
            self._previews.offer(preview)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store it, so that another attempt can go on from there."""
        self._checkpoints.offer(checkpoint)

    async def all_stored(self) -> None:
        """Wait until the latest checkpoint is stored, or was given up."""
        await self._checkpoints.drain()

    async def _send_progress(self, running: Running) -> None:
        try:
            self._obey(await self._queue.report(self._attempt.claim, running))
        except Unavailable:
            # Progress is worth nothing later; the work goes on and the terminal write decides.
            log.warning("report_skipped", job=self._attempt.claim.id)

    async def _send_preview(self, preview: Preview) -> None:
        picture = await asyncio.to_thread(encode_preview, preview.picture)
        try:
            self._obey(await self._queue.preview(self._attempt.claim, preview.step, preview.steps, picture))
        except Unavailable:
            log.warning("preview_skipped", job=self._attempt.claim.id)

    async def _store_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store, record, and only then keep it for the job's life: a blob that no record names goes by itself."""
        claim = self._attempt.claim
        stored = StoredCheckpoint(
            f"checkpoint:{claim.id}.{claim.fence}.{checkpoint.step}", checkpoint.step, checkpoint.steps
        )
        expires_at = int(time.time() * 1000) + milliseconds(UNRECORDED_SECONDS)
        try:
            await self._blobs.put(stored.blob, checkpoint.data, expires_at)
            reason = await self._queue.checkpoint(claim, stored)
            if reason is not StopReason.LEASE_LOST:
                await self._blobs.expire(stored.blob, claim.expires_at + milliseconds(KEPT_AFTER_DEADLINE))
            self._obey(reason)
        except Unavailable as exc:
            log.warning("checkpoint_skipped", job=claim.id, step=checkpoint.step, error=str(exc))

    def _obey(self, reason: StopReason | None) -> None:
        if reason is not None:
            self._attempt.stop.set(reason)

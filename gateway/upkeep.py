"""Upkeep that no request does: ends what is overdue and deletes blobs that nobody needs any more."""

import asyncio
import time
from collections.abc import Set
from typing import Final

import structlog

from img2img.blobs import BlobStore
from img2img.errors import Unavailable
from img2img.queue import JobQueue
from img2img.queue_types import Discard
from img2img.server import milliseconds

LONGEST_PAUSE: Final = 1.0
SHORTEST_PAUSE: Final = 0.05
OTHERS_PAUSE: Final = 5.0

log = structlog.get_logger(__name__)


async def run_upkeep(queue: JobQueue, blobs: BlobStore, input_retention: float) -> None:
    """Sweep for ever, at least once a second; every gateway may do it, each sweep is bounded and atomic."""
    while True:
        pause = LONGEST_PAUSE
        try:
            busy, due = await _sweep(queue, blobs, input_retention)
            if await blobs.sweep() or busy:
                pause = SHORTEST_PAUSE
            elif due is not None:
                pause = min(max(due, SHORTEST_PAUSE), LONGEST_PAUSE)
        except Unavailable as exc:
            log.warning("upkeep_failed", error=str(exc))
        await asyncio.sleep(pause)


async def run_upkeep_of_others(queue: JobQueue, known: Set[str], blobs: BlobStore, input_retention: float) -> None:
    """The same, less often, for queues that no settings name any more: jobs that are left there must end, too."""
    while True:
        try:
            for name in await queue.names() - known:
                await _sweep(queue.sibling(name), blobs, input_retention)
        except Unavailable as exc:
            log.warning("upkeep_failed", error=str(exc))
        await asyncio.sleep(OTHERS_PAUSE)


async def _sweep(queue: JobQueue, blobs: BlobStore, input_retention: float) -> tuple[bool, float | None]:
    """Whether there may be more to do at once, and else in how many seconds."""
    discarded, due = await queue.sweep()
    await asyncio.gather(*(_follow(queue, blobs, discard, input_retention) for discard in discarded))
    return bool(discarded), due


async def _follow(queue: JobQueue, blobs: BlobStore, discard: Discard, input_retention: float) -> None:
    retention = max(discard.kept, input_retention) if discard.is_input else discard.kept
    if retention <= 0:
        await blobs.delete(discard.key)
    else:
        await blobs.expire(discard.key, int(time.time() * 1000) + milliseconds(retention))
    await queue.discarded(discard)

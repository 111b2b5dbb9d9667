"""Batches: which jobs were submitted together. One key per batch, gone with its jobs' records."""

from collections.abc import Sequence

import msgspec
import uuid_utils

from img2img.errors import JobNotFound
from img2img.queue import JobQueue
from img2img.server import milliseconds, translated


class Batch(msgspec.Struct, frozen=True):
    account: str
    jobs: list[str]
    references: list[object]


class BatchStore:
    """Raises ``Unavailable`` when the server cannot be reached."""

    def __init__(self, queue: JobQueue) -> None:
        self._redis = queue.redis
        self._prefix = f"{queue.prefix}batch:"

    async def put(self, account: str, jobs: Sequence[str], references: Sequence[object], keep: float) -> str:
        """Record a batch for ``keep`` seconds and return its id."""
        batch_id = str(uuid_utils.uuid7())
        batch = Batch(account, list(jobs), list(references))
        with translated():
            await self._redis.set(self._prefix + batch_id, msgspec.json.encode(batch), px=milliseconds(keep))
        return batch_id

    async def get(self, account: str, batch_id: str) -> tuple[list[str], list[object]]:
        """Job ids and references, in the order of the requests.

        Raises:
            JobNotFound: no such batch on this account.
        """
        with translated():
            raw = await self._redis.get(self._prefix + batch_id)
        batch = None if raw is None else msgspec.json.decode(raw, type=Batch)
        if batch is None or batch.account != account:
            raise JobNotFound(batch_id)
        return batch.jobs, batch.references

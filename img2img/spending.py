"""What the calls of pools that cost money came to, read from the queue's server; its scripts keep the books.

Keys: docs/queue.md. Only the server's clock says what day it is, as everywhere in the queue.
"""

from collections.abc import Sequence
from datetime import date
from typing import Any, Final

from arq.connections import ArqRedis

from img2img.queue import SHARD
from img2img.queue_types import MILLIONTHS
from img2img.server import translated
from img2img.upstream import EPOCH, today_of

ALL: Final = "*"
"""Stands for all accounts together; no account is called so."""


class Spending:
    """The books of a server. Every method raises ``Unavailable`` when it cannot be reached."""

    def __init__(self, redis: ArqRedis) -> None:
        self._redis = redis
        self._prefix = f"img2img:{{{SHARD}}}:spend:"

    async def of(self, pool: str, day: date) -> dict[str, float]:
        """What was spent in ``pool`` on ``day`` (UTC), by account, and under ``ALL`` what that is together.

        It is in the currency of the pool's prices, with what is reserved for calls to come. Empty: nothing ever was.
        """
        with translated():
            found: Any = self._redis.hgetall(f"{self._prefix}{pool}:{(day - EPOCH).days}")
            spent: dict[bytes, bytes] = await found
        return {account.decode(): int(amount) / MILLIONTHS for account, amount in spent.items()}

    async def today_in(self, pools: Sequence[str]) -> dict[str, float]:
        """What was spent in each of ``pools`` today by all accounts, as :meth:`of` has it; a trip for each pool."""
        day, amounts = (await self.today() - EPOCH).days, {}
        for pool in pools:
            with translated():
                found: Any = self._redis.hget(f"{self._prefix}{pool}:{day}", ALL)
                amounts[pool] = int(await found or 0) / MILLIONTHS
        return amounts

    async def today(self) -> date:
        """The day (UTC) on which the server spends now."""
        return await today_of(self._redis)

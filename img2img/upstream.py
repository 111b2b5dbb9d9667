"""What all workers that call an upstream share, in the queue's server: its limits, its parked accounts, what it cost.

Keys and scripts: docs/queue.md. Only the server's clock counts, as everywhere in the queue.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from arq.connections import ArqRedis

from img2img import lua
from img2img.queue import SHARD
from img2img.server import milliseconds, open_redis, translated

SCRIPTS: Final = ("upstream_admit", "upstream_settle")
EPOCH: Final = date(1970, 1, 1)
NO_QUEUE: Final = ""
"""Accounts are shared by all queues of a server."""

ARRIVAL_SPREAD: Final = 1.0
"""By so many seconds one call may take longer than another to arrive.

The upstream counts a call there, we count it here. Without this much on top of its windows, slow calls of one window
and quick ones of the next would be too many in one of its.
"""


class Credential(msgspec.Struct, frozen=True):
    """An account of the upstream, and a digest that stands for one of its tokens."""

    account: str
    token_sha256: str


class Rates(msgspec.Struct, frozen=True):
    """How many calls are made within a window (seconds): of an account, and with a token.

    For ``new_day`` seconds after 00:00 UTC a used-up day may be the one before: of a call that was made on that, or by
    an upstream whose clock is late.
    """

    account_calls: int = 1500
    account_window: float = 60.0 + ARRIVAL_SPREAD
    token_calls: int = 1200
    token_window: float = 300.0 + ARRIVAL_SPREAD
    new_day: float = 300.0


class Pause(msgspec.Struct, frozen=True):
    """No call may be made for so many ``seconds``.

    Every account is ``parked`` (its day is used up), or some are ``held`` (the upstream asked for a pause) or
    ``limited`` (their window is full).
    """

    seconds: float
    why: Literal["parked", "held", "limited"]


class Spent(msgspec.Struct, frozen=True):
    """What an account was used for on a ``day`` (UTC); ``neurons`` are those that answers told."""

    day: str
    calls: int
    pictures: int
    neurons: float


class Books(msgspec.Struct, frozen=True):
    """An account's ``days``, today first, without those on which nothing was called; 0 seconds: it is not parked."""

    account: str
    parked_seconds: float
    days: tuple[Spent, ...]


class UpstreamLedger:
    """The shared books. Every method raises ``Unavailable`` when the server cannot be reached."""

    def __init__(self, redis: ArqRedis, rates: Rates) -> None:
        self._redis = redis
        self._rates = rates
        self._prefix = f"img2img:{{{SHARD}}}:"
        self._scripts = {script: redis.register_script(lua.source(script)) for script in SCRIPTS}

    async def admit(self, credentials: Sequence[Credential]) -> Credential | Pause:
        """Take one call out of the limits of the one of ``credentials`` with most room."""
        number, *pause = await self._ask(credentials, takes=True)
        return _pause(pause) or credentials[int(number) - 1]

    async def pause(self, credentials: Sequence[Credential]) -> Pause | None:
        """For how long none of ``credentials`` may make a call; None if one may now. Asking takes nothing."""
        _, *pause = await self._ask(credentials, takes=False)
        return _pause(pause)

    async def _ask(self, credentials: Sequence[Credential], *, takes: bool) -> Any:
        rates = self._rates
        windows = (
            rates.account_calls,
            milliseconds(rates.account_window),
            rates.token_calls,
            milliseconds(rates.token_window),
        )
        pairs = [value for credential in credentials for value in msgspec.structs.astuple(credential)]
        return await self._run("upstream_admit", *windows, int(takes), *pairs)

    async def settle(
        self,
        credential: Credential,
        *,
        pictures: int = 0,
        neurons: float = 0.0,
        held: float = 0.0,
        parked: bool = False,
    ) -> None:
        """Note what an answer brought, and what it said of its account.

        With ``held`` the credential is left alone for so many seconds; with ``parked`` its account until the next
        00:00 UTC, or on a new day for a minute.
        """
        told = (pictures, neurons, milliseconds(held), int(parked), milliseconds(self._rates.new_day))
        await self._run("upstream_settle", *msgspec.structs.astuple(credential), *told)

    async def accounts(self) -> list[str]:
        """Those with which calls were made lately, by their ids."""
        with translated():
            found: list[bytes] = await self._redis.zrange(f"{self._prefix}upstream-accounts", 0, -1)
        return sorted(account.decode() for account in found)

    async def books(self, account: str, days: int = 7) -> Books:
        """What the account was used for on the latest ``days``, and for how long it is parked still."""
        today = await today_of(self._redis)
        dates = [today - timedelta(days=past) for past in range(days)]
        with translated():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.pttl(f"{self._prefix}upstream-parked:{account}")
                for day in dates:
                    number = (day - EPOCH).days
                    pipe.hmget(f"{self._prefix}upstream-cost:{account}:{number}", ["calls", "pictures", "neurons"])
                parked, *rows = await pipe.execute()
        spent = (
            Spent(day.isoformat(), int(calls), int(pictures or 0), float(neurons or 0))
            for day, (calls, pictures, neurons) in zip(dates, rows, strict=True)
            if calls is not None
        )
        return Books(account, max(0, parked) / 1000, tuple(spent))

    async def _run(self, script: str, *arguments: Any) -> Any:
        with translated():
            return await self._scripts[script](keys=[self._prefix], args=[NO_QUEUE, *arguments])


def _pause(told: Sequence[Any]) -> Pause | None:
    return Pause(told[0] / 1000, told[1].decode()) if told else None


async def today_of(redis: ArqRedis) -> date:
    """The day (UTC) for which the server's books are kept now.

    Raises:
        Unavailable: it cannot be reached.
    """
    with translated():
        seconds, _ = await redis.time()
    return datetime.fromtimestamp(seconds, UTC).date()


@asynccontextmanager
async def open_ledger(redis_url: str, rates: Rates) -> AsyncIterator[UpstreamLedger]:
    """Open the books on a connection of their own.

    Raises:
        ConfigurationError: the URL is wrong.
    """
    async with open_redis(redis_url) as redis:
        yield UpstreamLedger(redis, rates)

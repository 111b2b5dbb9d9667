"""How much work each pool owes: what autoscalers are told, whichever way they ask (docs/autoscaling.md).

    backlog = estimated seconds of the jobs that are ready + what is left of those that run
    demand  = max(backlog, busy workers x target)

``target`` is the work, in seconds, that one worker may owe: the wait that is fine, times the jobs that a worker runs at
once. ``demand / target`` is the number of workers that are wanted.
"""

import asyncio
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from gateway.service import JobService
from img2img.errors import InvalidRequest, NotFound, Unavailable
from img2img.pools import Pool, Pools
from img2img.queue_types import QueueStats
from img2img.settings import MAX_SECONDS, Settings

FRESH_SECONDS: Final = 1.0
"""For so long an answer of the queue server serves everybody who asks."""
LEAST_TARGET: Final = 0.001


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool owes at the moment ``updated_at``.

    ``workers`` take jobs, ``slots`` at once in all, and ``busy_workers`` is how many of them the running jobs fill.
    ``queued`` jobs are ready to start.
    """

    pool: str
    backlog_seconds: float
    demand_seconds: float
    busy_workers: int
    workers: int
    slots: int
    queued: int
    running: int
    updated_at: datetime


class Calls(msgspec.Struct, frozen=True):
    """What bounds the calls of a pool whose engine calls an upstream: ``per_second`` of all its workers, and how many
    a worker makes at once.
    """

    per_second: float
    at_once: int


def busy_workers(running: int, workers: int, slots: int) -> int:
    """How many of the ``workers`` that have slots, ``slots`` in all, ``running`` jobs fill.

    Not how many have a job: a few jobs spread over many workers must not keep all of those.
    """
    return min(workers, math.ceil(running * workers / slots)) if slots else 0


def demand_seconds(backlog: float, busy: int, target: float) -> float:
    """The seconds of work that are owed: of ``busy`` workers at least ``target`` each, so that none is taken away
    because it has done the most of what it does.
    """
    return max(backlog, busy * target)


def calls_owed(queued: int, running: int, seconds: float, calls: Calls) -> float:
    """The calls that are to be under way at once, for ``queued`` jobs of ``seconds`` in all and ``running`` ones.

    More than the upstream takes in the time of a call would only wait for its limit.
    """
    if not queued:
        return float(running)
    return min(queued + running, max(1.0, calls.per_second * seconds / queued))


def signal_of(pool: str, stats: QueueStats, at: datetime, target: float, calls: Calls | None) -> Signal:
    """What ``pool`` owes by its ``stats``; with ``calls`` it is one that calls an upstream.

    Of such a pool the calls count and not their seconds: its demand is ``target`` for each worker that those fill.
    """
    workers, slots = len(stats.workers), sum(worker.slots for worker in stats.workers)
    open_workers = sum(worker.slots > 0 for worker in stats.workers)
    backlog, busy = stats.seconds + stats.running_seconds, busy_workers(stats.running, open_workers, slots)
    if calls is None:
        demand = demand_seconds(backlog, busy, target)
    elif workers and not slots:
        # The upstream takes no calls: more workers would only try in vain, and without any nobody would try at all.
        # Where no job is ready there is nothing to try with, and a pool may go to zero.
        demand = target * max(min(1, stats.queued), stats.running) / calls.at_once
    else:
        demand = target * calls_owed(stats.queued, stats.running, stats.seconds, calls) / calls.at_once
    return Signal(
        pool=pool,
        backlog_seconds=round(backlog, 3),
        demand_seconds=round(demand, 3),
        busy_workers=busy,
        workers=workers,
        slots=slots,
        queued=stats.queued,
        running=stats.running,
        updated_at=at,
    )


def is_active(signal: Signal, activation: float) -> bool:
    """Whether the pool needs a worker at all: for more than ``activation`` seconds of work, or for what runs still."""
    return signal.running > 0 or signal.demand_seconds > activation


def seconds_in(field: str, value: float | str | None, default: float, *, least: float) -> float:
    """A number of seconds from ``least`` that somebody sent as ``field``, or ``default``.

    Raises:
        InvalidRequest: it is no such number.
    """
    if value is None:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not least <= seconds <= MAX_SECONDS:
        raise InvalidRequest(field, f"'{field}' must be a number of seconds from {least:g}")
    return seconds


class Scaling:
    """The signals of all pools. One per process: whoever asks shares its trips to the queue server."""

    def __init__(self, service: JobService, pools: Pools, settings: Settings) -> None:
        self._service = service
        self._target = settings.scaler_target_seconds
        self._calls = {name: _calls_of(pool, settings) for name, pool in pools.by_name.items()}
        self._lock = asyncio.Lock()
        self._stats: Mapping[str, QueueStats] = {}
        self._failure: str | None = None
        self._read_at = datetime.fromtimestamp(0, UTC)
        self._stale_at = -math.inf

    @property
    def default_target(self) -> float:
        """Seconds of work that a worker may owe, for who says nothing else."""
        return self._target

    def check(self, pool: str | None) -> str:
        """The name, if there is such a pool.

        Raises:
            InvalidRequest: nobody named one.
            NotFound: there is none of that name.
        """
        known = ", ".join(self._calls)
        if not pool:
            raise InvalidRequest("pool", f"'pool' must be the name of one of these: {known}")
        if pool not in self._calls:
            raise NotFound(f"No such pool {pool!r}: name one of these: {known}")
        return pool

    async def signal(self, pool: str | None, target: float | None = None) -> Signal:
        """What ``pool`` owes, a second ago at most; ``target`` in place of the settings' seconds for a worker.

        Raises:
            InvalidRequest, NotFound: see :meth:`check`.
            Unavailable: the queue server cannot be reached.
        """
        name = self.check(pool)
        await self._refresh()
        wanted = self._target if target is None else target
        return signal_of(name, self._stats[name], self._read_at, wanted, self._calls[name])

    def signals_of(self, pools: Mapping[str, QueueStats]) -> dict[str, Signal]:
        """What ``pools`` owe by their stats, which were read just now."""
        now = datetime.now(UTC)
        return {name: signal_of(name, stats, now, self._target, self._calls[name]) for name, stats in pools.items()}

    async def _refresh(self) -> None:
        now = asyncio.get_running_loop().time
        async with self._lock:
            if now() >= self._stale_at:
                try:
                    self._stats, self._failure = (await self._service.stats()).pools, None
                except Unavailable as exc:
                    self._failure = str(exc)
                self._read_at = datetime.now(UTC)
                self._stale_at = now() + FRESH_SECONDS
            # Whoever waited for the answer shares it, also when it is that there is none.
            if self._failure is not None:
                raise Unavailable(self._failure)


def _calls_of(pool: Pool, settings: Settings) -> Calls | None:
    if not pool.calls_upstream:
        return None
    one_account = min(settings.upstream_account_calls, settings.upstream_token_calls / 5)
    return Calls((pool.calls_per_minute or one_account) / 60, settings.upstream_max_concurrency)

"""Clients that go on asking whatever happens, and remember every promise that they were given."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec

from tests.chaos.clients import Caller, Ended, GrpcCaller, RestCaller, TryAgain
from tests.chaos.fleet import ACCOUNTS, Fleet
from tests.chaos.orders import Errand, Order, draw

PAUSE: Final = (0.1, 0.5)
TERMINAL: Final = frozenset({"succeeded", "failed", "canceled", "expired"})
T = TypeVar("T")


class Cancel(msgspec.Struct, frozen=True):
    """A cancel that was acknowledged with ``state``; times in seconds since 1970."""

    asked: float
    told: float
    state: str


class Record(msgspec.Struct):
    """All that a client knows of its order."""

    order: Order
    job_ids: list[str] = []
    """One per acknowledgement."""
    cancel: Cancel | None = None
    seen: list[tuple[int, str]] = []
    watched: bool = False
    """A watcher saw the terminal event."""
    picture: str | None = None
    """SHA-256 of what a synchronous call was answered with."""
    abandoned: int = 0
    """Tries of a synchronous call that found its job canceled, because nobody had waited for it."""
    problems: list[str] = []


class Load:
    """Sends ``rate`` new orders a second; every call is repeated on either gateway until it is answered."""

    def __init__(self, fleet: Fleet) -> None:
        self.records: list[Record] = []
        self.retries = 0
        self.resumes = 0
        self._fleet = fleet
        self._dice = random.Random(f"load {fleet.profile.seed}")
        self._callers: dict[tuple[str, bool], list[Caller]] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for account in ACCOUNTS:
            for http, grpc in self._fleet.addresses:
                rest, rpc = RestCaller(http, account), GrpcCaller(grpc, account)
                self._callers.setdefault((account, False), []).append(rest)
                self._callers.setdefault((account, True), []).append(rpc)
                for caller in (rest, rpc):
                    self._stack.push_async_callback(caller.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._stack.aclose()

    async def run(self) -> None:
        """Send orders until cancelled; never faster than ``rate``, however long something hung."""
        profile = self._fleet.profile
        while True:
            record = Record(draw(profile.seed, len(self.records) + 1))
            self.records.append(record)
            client = asyncio.create_task(self._serve(record), name=record.order.key)
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)
            await asyncio.sleep(1 / profile.rate)

    async def done(self, seconds: float) -> list[Record]:
        """Wait until every client has what it wants; answers with the records of those that have not."""
        if self._clients:
            await asyncio.wait(self._clients, timeout=seconds)
        waiting = {client.get_name() for client in self._clients}
        return [record for record in self.records if record.order.key in waiting]

    async def _serve(self, record: Record) -> None:
        try:
            if record.order.errand is Errand.WAITS:
                await self._wait(record)
            else:
                await self._submit(record, record.order.over_grpc)
                await self._attend(record)
        except* Exception as errors:
            record.problems += [f"its client got {error!r}" for error in errors.exceptions]

    async def _attend(self, record: Record) -> None:
        order = record.order
        async with asyncio.TaskGroup() as group:
            if order.watch_over_grpc is not None:
                group.create_task(self._watch(record, order.watch_over_grpc))
            if order.cancel_after is not None:
                group.create_task(self._cancel(record, order.cancel_after))
            if order.resubmit_after is not None:
                await asyncio.sleep(order.resubmit_after)
                await self._submit(record, order.resubmit_over_grpc)

    async def _wait(self, record: Record) -> None:
        tries = 0
        while record.picture is None:
            try:
                caller = self._caller(record.order, record.order.over_grpc)
                job_id, record.picture = await caller.generate(record.order, tries)
                record.job_ids.append(job_id)
            except TryAgain:
                self.retries += 1
            except Ended as exc:
                if str(exc) != "canceled":
                    return
                record.abandoned += 1
            tries += 1
            await self._pause()

    async def _submit(self, record: Record, over_grpc: bool) -> None:
        order = record.order
        record.job_ids.append(await self._patiently(order, over_grpc, lambda caller: caller.create(order)))

    async def _cancel(self, record: Record, pause: float) -> None:
        await asyncio.sleep(pause)
        asked = time.time()
        job_id, over_grpc = record.job_ids[0], not record.order.over_grpc
        state = await self._patiently(record.order, over_grpc, lambda caller: caller.cancel(job_id))
        record.cancel = Cancel(asked, time.time(), state)

    async def _watch(self, record: Record, over_grpc: bool) -> None:
        job_id = record.job_ids[0]
        while not record.watched:
            after = record.seen[-1][0] if record.seen else 0
            caller = self._caller(record.order, over_grpc)
            try:
                async for event in caller.watch(job_id, after):
                    record.seen.append(event)
            except TryAgain:
                pass
            record.watched = bool(record.seen) and record.seen[-1][1] in TERMINAL
            if not record.watched:
                self.resumes += 1
                await self._pause()

    async def _patiently(self, order: Order, over_grpc: bool, call: Callable[[Caller], Awaitable[T]]) -> T:
        while True:
            try:
                return await call(self._caller(order, over_grpc))
            except TryAgain:
                self.retries += 1
            await self._pause()

    def _caller(self, order: Order, over_grpc: bool) -> Caller:
        return self._dice.choice(self._callers[order.account, over_grpc])

    async def _pause(self) -> None:
        await asyncio.sleep(self._dice.uniform(*PAUSE))

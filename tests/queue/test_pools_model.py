"""Jobs in pools at random: after each step every job is in one place, every sum is right, and no cap is broken."""

import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import pytest
from arq.connections import ArqRedis

from img2img.errors import (
    Congested,
    IdempotencyConflict,
    JobNotFound,
    LeaseLost,
    NoCapacity,
    NotReplayable,
    SpendCapReached,
)
from img2img.jobs import Failure, JobState, OnLost, Outcome, PreviewPicture, Running, StopReason, StoredCheckpoint
from img2img.queue import JobQueue
from img2img.queue_types import Candidate, Claim, Join, Lifetime, Share, Waiter, WorkerInfo
from tests.queue.books import KEEP, Snapshot, age, end_day
from tests.queue.calls import spec

STEPS: Final = 400
LEASE: Final = 6.0
LONGEST: Final = 300.0
PRICES: Final = {"burst": 10, "rented": 7}
CAPS: Final = {"burst": (30, 20), "rented": (14, 7)}
"""For all accounts together, and for each."""
POOLS: Final = ("local", "cpu", "burst", "rented")
ACCOUNTS: Final = ("acme", "other", "stays")
LOCAL_ONLY: Final = "stays"
ROUTES: Final = (
    ("local", "burst"),
    ("local", "cpu", "burst"),
    ("burst", "local"),
    ("rented", "local", "burst"),
    ("cpu",),
)
JOINS: Final[tuple[Literal["idempotency", "first", "retry"], ...]] = ("idempotency", "first", "retry")
KINDS: Final[tuple[Literal["failures", "interruptions"], ...]] = ("failures", "interruptions")
ON_LOST: Final[tuple[OnLost, ...]] = ("retry", "fail")
FAILED: Final = Failure("x", "y")
LEFT: Final = ("fence", "queues", "rested:", "service:", "spend:", "stall:", "totals:", "wake:")
"""What may be left when every job is gone: docs/queue.md, "Keys"."""


class World:
    """Front ends, workers and time, each of which does something at random."""

    def __init__(self, queue: JobQueue, redis: ArqRedis, seed: int) -> None:
        self.queue = queue
        self.redis = redis
        self.random = random.Random(seed)
        self.pools = {name: queue.sibling(name) for name in POOLS}
        self.routes: dict[str, tuple[str, ...]] = {}
        self.claims: dict[int, tuple[str, str, Claim]] = {}
        self.calls: Counter[int] = Counter()
        self.waiters: list[tuple[str, Waiter]] = []
        self.paid: Counter[tuple[str, str]] = Counter()
        """What stays spent, by pool and account."""
        self.called = ""
        """The job whose calls the last step has accounted for."""
        self.numbers = itertools.count()

    def candidates(self, account: str) -> tuple[Candidate, ...]:
        chance, route = self.random, self.random.choice(ROUTES)
        max_wait = chance.choice([None, 100, 20_000])
        names = [name for name in route if account != LOCAL_ONLY or name != "burst"]
        return tuple(
            Candidate(
                name,
                max_queued=chance.choice([0, 0, 30]),
                max_wait=max_wait,
                start=chance.choice([0, 1000, 30_000]),
                price=PRICES.get(name, 0),
                cap=CAPS[name][0] if name in CAPS else None,
                tenant_cap=CAPS[name][1] if name in CAPS else None,
            )
            for name in names
        )

    def worker(self, pools: Sequence[str] = POOLS) -> tuple[str, str]:
        """The pool and the name of one."""
        pool = self.random.choice(pools)
        return pool, f"{pool}-{self.random.randrange(2)}"

    def held(self, worker: str) -> list[Claim]:
        return [claim for _, holder, claim in self.claims.values() if holder == worker]

    def claimed(self) -> tuple[str, Claim] | None:
        """A claim that some worker believes to hold, and its pool."""
        if not self.claims:
            return None
        pool, _, claim = self.random.choice(list(self.claims.values()))
        return pool, claim

    def job(self) -> str:
        return self.random.choice([*self.routes, "0-none"])

    async def submit(self) -> None:
        chance, account = self.random, self.random.choice(ACCOUNTS)
        options: dict[str, object] = {"reject_if_busy": chance.random() < 0.1}
        if chance.random() < 0.15:
            options["not_before"] = (datetime.now(UTC) + timedelta(seconds=chance.choice([1, 60]))).isoformat()
        order = spec(self.queue, account, options, num_steps=chance.choice([1, 20]))
        pools, mode = self.candidates(account), chance.choice(JOINS)
        join = Join(f"{account}:{chance.randrange(5)}", mode, 60_000) if chance.random() < 0.2 else None
        waiter = Waiter(str(next(self.numbers)), 9000, 1000) if chance.random() < 0.25 else None
        seconds, own = chance.choice([1, 10, 100, LONGEST]), chance.random() < 0.5
        lifetime = Lifetime(seconds, KEEP, longest=2 * LONGEST, asked_for=own)
        share = Share(weight=chance.choice([1, 3]), max_queued=chance.choice([0, 0, 8]))
        try:
            got = await self.queue.submit(order, lifetime, share=share, join=join, waiter=waiter, pools=pools)
        except (Congested, NoCapacity, IdempotencyConflict):
            return
        if got.created:
            self.routes[got.id] = tuple(pool.name for pool in pools)
        if waiter:
            self.waiters.append((got.id, waiter))

    async def claim(self) -> None:
        """Where there is something to claim, or else anywhere."""
        stats = {name: await pool.stats() for name, pool in self.pools.items()}
        pool, worker = self.worker([name for name in POOLS if stats[name].queued] or POOLS)
        lease, token, held = self.random.choice([1.0, LEASE]), str(next(self.numbers)), self.held(worker)
        count = self.random.choice([1, 3])
        for _ in range(self.random.choice([1, 1, 2])):  # the second time because the answer was lost
            claims, _ = await self.pools[pool].claim(worker, count, lease, token, engine="e/m", held=held)
            self.claims.update({claim.fence: (pool, worker, claim) for claim in claims})

    async def call(self) -> None:
        """A worker says that it calls an upstream, says so again, or that there is an answer."""
        if not (found := self.claimed()):
            return
        (pool, claim), kind = found, self.random.choice(["new", "new", "again", "answer", "billed"])
        self.called = claim.id
        self.calls[claim.fence] += kind == "new"
        key, account = f"{self.queue.prefix}job:{claim.id}", claim.spec.account
        lost = await self.redis.hget(key, "charged")  # type: ignore[misc]
        on_lost = None if kind in ("answer", "billed") else self.random.choice(ON_LOST)
        try:
            told = await self.pools[pool].sent(claim, self.calls[claim.fence], on_lost, billed=kind == "billed")
        except SpendCapReached:
            return
        if kind == "new" and told is None and lost:
            self.paid[pool, account] += PRICES[pool]

    async def finish(self) -> None:
        if found := self.claimed():
            pool, claim = found
            del self.claims[claim.fence]
            state = self.random.choice([JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED])
            error = None if state == JobState.SUCCEEDED else FAILED
            await _unless_lost(self.pools[pool].finish(claim, Outcome(state=state, error=error)))

    async def release(self) -> None:
        if found := self.claimed():
            pool, claim = found
            del self.claims[claim.fence]
            kind, delay = self.random.choice(KINDS), self.random.choice([0, 3, 60, 7000])
            await _unless_lost(self.pools[pool].release(claim, FAILED, kind, delay=delay))

    async def report(self) -> None:
        if found := self.claimed():
            pool, claim = self.pools[found[0]], found[1]
            tell: list[Callable[[], Awaitable[object]]] = [
                lambda: pool.report(claim, Running(executed_by="x")),
                lambda: pool.checkpoint(claim, StoredCheckpoint(f"checkpoint:{next(self.numbers)}", 1, 5)),
                lambda: pool.preview(claim, 1, 5, PreviewPicture("image/png", 1, 1, b"x")),
            ]
            await self.random.choice(tell)()

    async def cancel(self) -> None:
        try:
            await self.queue.cancel(self.job(), self.random.choice([StopReason.USER, StopReason.DISCONNECT]))
        except JobNotFound:
            return

    async def replay(self) -> None:
        try:
            await self.queue.replay(self.job(), self.random.choice([1.0, LONGEST]))
        except (JobNotFound, NotReplayable, SpendCapReached):
            return

    async def wait(self) -> None:
        if self.waiters:
            job_id, waiter = self.random.choice(self.waiters)
            await self.random.choice([self.queue.wait_for, self.queue.leave])(job_id, waiter)

    async def beat(self) -> None:
        pool, worker = self.worker()
        info = WorkerInfo(worker, self.random.choice([0, 1, 5]), "e", "m", "cpu", 512 * 512)
        stops = await self.pools[pool].beat(info, self.held(worker), lease=LEASE, ttl=2 * LEASE)
        for fence, reason in stops.items():
            if reason is StopReason.LEASE_LOST:
                del self.claims[fence]

    async def sign_off(self) -> None:
        pool, worker = self.worker()
        await self.pools[pool].sign_off(worker)

    async def sweep(self) -> None:
        for pool in self.pools.values():
            for discard in (await pool.sweep())[0]:
                await pool.discarded(discard)

    async def pass_time(self) -> None:
        await age(self.redis, self.random.choice([100, 1500, 4000, 12_000]), swept=self.random.random() < 0.7)

    async def pass_more_time(self) -> None:
        await age(self.redis, 60_000)
        await self.sweep()

    async def end_day(self) -> None:
        await end_day(self.redis)

    async def step(self) -> str:
        """Do something; answers with what."""
        self.called = ""
        often = [self.submit, self.claim, self.call]
        seldom = [self.pass_more_time, self.end_day, self.sign_off]
        others = [self.finish, self.release, self.report, self.cancel, self.replay, self.wait, self.beat, self.sweep]
        others.append(self.pass_time)
        weights = [10] * len(often) + [3] * len(others) + [1] * len(seldom)
        (act,) = self.random.choices([*often, *others, *seldom], weights)
        await act()
        return act.__name__

    def account(self, before: Snapshot, after: Snapshot) -> None:
        """What is spent is reserved or charged for a job, or stays spent for one, and is within the caps."""
        for job_id, job in before.jobs.items():
            then = after.jobs.get(job_id, {})
            pool, owner = job["queue"], job["account"]
            if "charged" in job and "charged" not in then and job_id != self.called:
                self.paid[pool, owner] += PRICES[pool]
            if "reserved" in job and not then.keys() & {"reserved", "charged"} and then["state"] == "succeeded":
                self.paid[pool, owner] += PRICES[pool]
        owed = Counter(self.paid)
        for job in after.jobs.values():
            held = job.keys() & {"reserved", "charged"}
            assert len(held) <= 1
            assert held or not (job["queue"] in PRICES and job["attempt"] == "0" and job["state"] == "queued")
            owed[job["queue"], job["account"]] += PRICES[job["queue"]] if held else 0
        spent: Counter[tuple[str, str]] = Counter()
        for (pool, _), amounts in after.spent().items():
            assert amounts.total() <= CAPS[pool][0]
            assert max(amounts.values()) <= CAPS[pool][1]
            spent.update({(pool, owner): amount for owner, amount in amounts.items()})
        assert +spent == +owed


async def _unless_lost(writing: Awaitable[None]) -> None:
    try:
        await writing
    except LeaseLost:
        return


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_the_books_are_right(queue: JobQueue, redis: ArqRedis, seed: int) -> None:
    """In the end nothing is left of any job."""
    world, before = World(queue, redis, seed), Snapshot([])
    for number in range(STEPS):
        did = await world.step()
        after = await Snapshot.take(redis)
        try:
            after.check(POOLS, ACCOUNTS)
            world.account(before, after)
            assert all(job["queue"] in world.routes[job_id] for job_id, job in after.jobs.items())
        except AssertionError as exc:
            exc.add_note(f"seed {seed}, step {number}: {did}")
            raise
        before = after
    for _ in range(30):
        await world.pass_more_time()
        after = await Snapshot.take(redis)
        after.check(POOLS, ACCOUNTS)
        world.called = ""
        world.account(before, after)
        before = after
    names = [key.removeprefix(queue.prefix) for key in after.keys]
    assert [name for name in names if not name.startswith(LEFT)] == []

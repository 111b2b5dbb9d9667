"""Does a long queue slow a fresh job down? Pick-up by an idle worker, 10,000 running and 100,000 queued beside it.

The backlog is made through the real ``JobQueue``: submitted, and as far as it is to run, claimed by pretended workers
under a long lease. The fresh job belongs to an account of its own, and those of the backlog have had one job before, so
that an idle worker's next claim must hand it out. Timed is from the beginning of its submission until the worker, which
waits in ``wait_for_work``, has claimed it. Rounds on the loaded server alternate with rounds on an empty one, and the
ratio is between their medians.

    python bench/queue_scale.py [--quick]
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from redis.asyncio import Redis

from bench.jobs import LIFETIME, fresh_spec
from bench.valkey import fresh_server
from img2img.jobs import JobState, Outcome
from img2img.queue import JobQueue
from img2img.queue_types import Claim, WorkerInfo
from img2img.server import open_redis

ACCOUNTS: Final = (1, 1000)
STEPS: Final = (
    # Two ways up, so that each is counted alone and both together: (running, queued)
    ((0, 0), (1_000, 0), (10_000, 0), (10_000, 10_000), (10_000, 100_000)),
    ((0, 10_000), (0, 100_000), (1_000, 100_000)),
)
QUICK_STEPS: Final = (((1_000, 0), (1_000, 5_000)),)
SUBMITTERS: Final = 64
CLAIM_COUNT: Final = 100
LONG_LEASE: Final = 3600.0
LEASE: Final = 6.0
WAIT: Final = 5.0
SETTLE: Final = 0.003
"""The worker is surely waiting again after this many seconds."""
ENGINE: Final = "none/none"
MEASURED: Final = "50 1000 50 20000 1000"
"""As if fifty jobs of 20 steps had taken a second each: see lua/_service.lua."""
CANCELED: Final = Outcome(state=JobState.CANCELED)
"""How jobs end here, so that the time of those that do nothing is not learned."""


class Backlog:
    """Jobs that wait and jobs that run on one server, more with each step."""

    def __init__(self, queue: JobQueue, url: str, accounts: int) -> None:
        self._queue = queue
        self._url = url
        self._accounts = [f"account-{number}" for number in range(accounts)]
        self._running = 0
        self._queued = 0

    async def begin(self) -> None:
        """Let each account have had one job, so that whoever comes later goes before it."""
        async with Redis.from_url(self._url) as redis:
            measured = {"native": MEASURED, "*": MEASURED}
            await redis.hset(f"{self._queue.prefix}service:{self._queue.name}:{ENGINE}", mapping=measured)
            await redis.hset(f"{self._queue.prefix}totals:{self._queue.name}", "engine", ENGINE)
        worker = "pretended"
        for number, account in enumerate(self._accounts):
            await self._queue.submit(fresh_spec(account), LIFETIME)
            (claim,), _ = await self._queue.claim(worker, 1, LEASE, str(number), engine=ENGINE)
            await self._queue.finish(claim, CANCELED)

    async def grow(self, running: int, queued: int) -> None:
        """Submit and claim as many as are missing, unsynced, and leave the server as an idle worker finds it."""
        async with Redis.from_url(self._url) as redis:
            # A rewrite of the whole file at some moment would be counted with whatever step it falls into.
            await redis.config_set("auto-aof-rewrite-percentage", 0)
            await redis.config_set("appendfsync", "no")
            await self._claim_more(running)
            await self._submit_more(queued - self._queued)
            await redis.delete(self._queue.wake_key)
            await redis.config_set("appendfsync", "always")

    async def _submit_more(self, jobs: int) -> None:
        accounts = itertools.cycle(self._accounts)
        left = iter(range(jobs))

        async def submitter() -> None:
            for _ in left:
                await self._queue.submit(fresh_spec(next(accounts)), LIFETIME)

        await asyncio.gather(*(submitter() for _ in range(SUBMITTERS)))
        self._queued += max(0, jobs)

    async def _claim_more(self, running: int) -> None:
        await self._submit_more(running - self._running - self._queued)
        while self._running < running:
            worker = WorkerInfo(f"pretended-{self._running}", CLAIM_COUNT, "none", "none", "cpu")
            count = min(CLAIM_COUNT, running - self._running)
            claims, _ = await self._queue.claim(worker.id, count, LONG_LEASE, "1", engine=ENGINE)
            assert len(claims) == count, f"{len(claims)} claims, not {count}"
            await self._queue.beat(worker, claims, lease=LONG_LEASE, ttl=LONG_LEASE)
            self._running += count
            self._queued -= count


class Probe:
    """A fresh job and an idle worker on one server."""

    _numbers = itertools.count()

    def __init__(self, submitting: JobQueue, claiming: JobQueue) -> None:
        self._submitting = submitting
        self._claiming = claiming

    async def once(self) -> float:
        """Milliseconds from submission to claim."""
        number = next(self._numbers)
        worker = asyncio.create_task(self._take(str(number)), name="worker")
        await asyncio.sleep(SETTLE + random.random() * SETTLE)
        # An account that has had nothing yet.
        spec = fresh_spec(f"0-{number}")
        began = time.perf_counter()
        await self._submitting.submit(spec, LIFETIME)
        claim, claimed = await worker
        assert claim.id == spec.id, "the worker claimed another job than the fresh one"
        await self._claiming.finish(claim, CANCELED)
        return 1000 * (claimed - began)

    async def _take(self, token: str) -> tuple[Claim, float]:
        await self._claiming.wait_for_work(WAIT)
        claims, _ = await self._claiming.claim("idle", 1, LEASE, token, engine=ENGINE)
        return claims[0], time.perf_counter()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[JobQueue, JobQueue]]:
    async with AsyncExitStack() as stack:
        submitting, claiming = [JobQueue(await stack.enter_async_context(open_redis(url))) for _ in range(2)]
        yield submitting, claiming


async def climb(accounts: int, steps: tuple[tuple[int, int], ...], rounds: int) -> dict[str, dict[str, float]]:
    """Measure at each step of one backlog, beside an empty server."""
    figures = {}
    async with (
        fresh_server("always") as loaded_url,
        fresh_server("always") as empty_url,
        connected(loaded_url) as loaded,
        connected(empty_url) as empty,
    ):
        backlog = Backlog(loaded[0], loaded_url, accounts)
        await backlog.begin()
        for running, queued in steps:
            began = time.perf_counter()
            await backlog.grow(running, queued)
            built = time.perf_counter() - began
            taken: list[float] = []
            compared: list[float] = []
            for probe, times in ((Probe(*loaded), taken), (Probe(*empty), compared)):
                times.append(await probe.once())
                times.clear()
            for _ in range(rounds):
                compared.append(await Probe(*empty).once())
                taken.append(await Probe(*loaded).once())
            one = figures[f"{accounts}_accounts_{running}_running_{queued}_queued"] = compare(taken, compared)
            print(
                f"{accounts:9}{running:9}{queued:9}{one['p50_ms']:10.2f}{one['p99_ms']:8.2f}"
                f"{one['empty_p50_ms']:12.2f}{one['empty_p99_ms']:8.2f}{one['ratio']:9.2f}x   (built in {built:.0f} s)",
                flush=True,
            )
    return figures


def compare(taken: list[float], compared: list[float]) -> dict[str, float]:
    def p99(values: list[float]) -> float:
        return round(sorted(values)[round(0.99 * (len(values) - 1))], 2)

    p50, empty = statistics.median(taken), statistics.median(compared)
    return {
        "p50_ms": round(p50, 2),
        "p99_ms": p99(taken),
        "empty_p50_ms": round(empty, 2),
        "empty_p99_ms": p99(compared),
        "ratio": round(p50 / empty, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1,000 running and 5,000 queued, fewer rounds")
    quick = parser.parse_args().quick
    head = f"{'accounts':>9}{'running':>9}{'queued':>9}{'p50 ms':>10}{'p99':>8}"
    print(head + f"{'empty p50':>12}{'p99':>8}{'p50 ratio':>10}")
    figures: dict[str, dict[str, float]] = {}
    for accounts in ACCOUNTS:
        for steps in QUICK_STEPS if quick else STEPS:
            figures |= uvloop.run(climb(accounts, steps, rounds=60 if quick else 200))
    worst = max(figures.values(), key=lambda one: one["ratio"])
    flat = {f"{name}_{key}": value for name, one in figures.items() for key, value in one.items()}
    print(json.dumps({"bench": "queue_scale", "worst_ratio": worst["ratio"], "worst_p50_ms": worst["p50_ms"], **flat}))


if __name__ == "__main__":
    main()

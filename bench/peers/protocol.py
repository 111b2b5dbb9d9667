"""What every peer's script does alike: the payload, the notes of when jobs began, the producer's measurements.

A script is called ``python with_NAME.py worker`` or ``python with_NAME.py latency|burst JOBS``. ``BENCH_URL`` is the
server, ``BENCH_NOTES`` the file of notes, ``BENCH_WARM_UP`` the number of jobs before the measured ones. It runs in its
peer's environment, so only the standard library is used.
"""

import asyncio
import inspect
import itertools
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import cache
from pathlib import Path
from typing import Any, Final

URL: Final = os.environ.get("BENCH_URL", "")
PAYLOAD: Final = "x" * 400
"""Goes into each job and comes back as its result; about what our jobs carry."""
SLOTS: Final = 100
"""Jobs that a worker on asyncio may run at once."""
THREADS: Final = 20
IN_FLIGHT: Final = 20
"""Submissions under way at once in a burst."""
WARM_UP: Final = int(os.environ.get("BENCH_WARM_UP", "0"))
GAP: Final = 0.03
"""At most this many seconds lie between two sequential jobs, so that the worker is idle at any phase of its loop."""

Submit = Callable[[], Any]
"""Submits a job and returns a function that waits for its result; each of the two may be a coroutine function."""


class Notes:
    """When each job's function began, in monotonic seconds, in a file that worker and producer share."""

    def __init__(self) -> None:
        with Path(os.environ["BENCH_NOTES"]).open("r+b") as file:
            self._view = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        self._next = itertools.count()

    def add(self) -> None:
        self._view[next(self._next)] = time.monotonic()

    def times(self) -> list[float]:
        return list(itertools.takewhile(bool, self._view))

    def wait_for(self, jobs: int) -> None:
        """Return once that many jobs have begun: a thread may write its note after those with later numbers."""
        while not (self._view[jobs - 1] and all(self._view[:jobs])):
            time.sleep(0.001)


@cache
def notes() -> Notes:
    """Opened by the process that runs jobs, which may be a fork of the one that imported this."""
    return Notes()


def job(payload: str) -> str:
    """The job of every peer."""
    notes().add()
    return payload


def produce(client: Callable[[], AbstractAsyncContextManager[Submit]]) -> None:
    """Measure a peer on asyncio; its producer gets uvloop, as ours does."""
    import uvloop

    async def run() -> None:
        async with client() as submit:
            report(await measure(submit, burst_of_tasks))

    uvloop.run(run())


def produce_blocking(submit: Submit) -> None:
    """Measure a peer with a blocking client, which submits a burst from threads."""

    async def burst(submit: Submit, jobs: int) -> None:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(lambda _: submit(), range(jobs)))

    report(asyncio.run(measure(submit, burst)))


async def measure(submit: Submit, burst: Callable[[Submit, int], Awaitable[None]]) -> dict[str, list[float] | float]:
    before = len(notes().times()) + WARM_UP
    await sequential(submit, WARM_UP)
    await asyncio.to_thread(notes().wait_for, before)
    mode, jobs = sys.argv[1], int(sys.argv[2])
    if mode == "latency":
        began, ended = await sequential(submit, jobs)
        starts = notes().times()[before:]
        assert len(starts) == jobs, f"{len(starts)} jobs began, not {jobs}"
        return {
            "pickup": [start - begin for start, begin in zip(starts, began, strict=True)],
            "result": [end - begin for end, begin in zip(ended, began, strict=True)],
        }
    started = time.monotonic()
    await burst(submit, jobs)
    submitted = time.monotonic() - started
    await asyncio.to_thread(notes().wait_for, before + jobs)
    return {"submit_seconds": submitted, "seconds": max(notes().times()) - started}


async def sequential(submit: Submit, jobs: int) -> tuple[list[float], list[float]]:
    """One job after another: when each submission began, and when its result was there."""
    began, ended = [], []
    for _ in range(jobs):
        await asyncio.sleep(random.random() * GAP)
        began.append(time.monotonic())
        await settled((await settled(submit()))())
        ended.append(time.monotonic())
    return began, ended


async def burst_of_tasks(submit: Submit, jobs: int) -> None:
    left = iter(range(jobs))

    async def submitter() -> None:
        for _ in left:
            await submit()

    await asyncio.gather(*(submitter() for _ in range(IN_FLIGHT)))


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def report(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)

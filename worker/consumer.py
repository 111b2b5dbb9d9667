"""arq's worker with our own way of getting jobs: claims by script, woken by a list, under a lease and a fence.

arq's ``run_job`` is kept: it reads the payload, runs the function and calls ``finish_job``, which is where the
runner's decision is written. arq's polling, tries, time limits and signals are switched off.
"""

import asyncio
import random
from typing import Any, Final

import msgspec
import structlog
from arq.worker import Worker, func

from img2img.errors import LeaseLost, Unavailable
from img2img.jobs import Failure, Outcome, StopReason
from img2img.queue import Claim, JobQueue, WorkerInfo
from img2img.settings import Settings
from worker.runner import Decision, JobRunner, Lost, Release, Stop

NEVER: Final = 30 * 24 * 3600
MAX_IDLE_WAIT: Final = 5.0
RETRY_SECONDS: Final = 0.5
NO_DECISION: Final = Release(Failure("engine_failed", "The attempt ended without a decision"), spent=True)

log = structlog.get_logger(__name__)


class Consumer(Worker):
    """Claims and runs jobs until drained. Open it as an async context manager, then ``await main()``."""

    def __init__(self, queue: JobQueue, runner: JobRunner, info: WorkerInfo, settings: Settings) -> None:
        super().__init__(
            functions=[func(self._generate, name="generate", timeout=NEVER, max_tries=NEVER)],
            queue_name=queue.alive_key,
            redis_pool=queue.redis,
            handle_signals=False,
            max_jobs=info.slots,
            job_serializer=msgspec.json.encode,
            job_deserializer=msgspec.json.decode,
            log_results=False,
        )
        self._queue = queue
        self._runner = runner
        self._info = info
        self._settings = settings
        self._claims: dict[str, Claim] = {}
        self._stops: dict[str, Stop] = {}
        self._decisions: dict[str, Decision] = {}
        self._draining = asyncio.Event()
        self._slot_freed = asyncio.Event()

    async def main(self) -> None:
        """Run until :meth:`drain`; a side task that dies takes the worker down with it."""
        await self._beat_once()
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._beat_forever(), name="beat")
            control = group.create_task(self._obey_forever(), name="control")
            await self._claim_until_drained()
            # Shutdown: nothing new is claimed from here; running jobs get their time, then are
            # interrupted and handed back; the beat keeps their leases until the last one is written.
            await self._finish_running()
            beat.cancel()
            control.cancel()
        await self._sign_off()

    def drain(self) -> None:
        """Stop claiming; ``main`` returns when the running jobs are done or handed back."""
        self._draining.set()

    async def _claim_until_drained(self) -> None:
        while not self._draining.is_set():
            free = self._info.slots - len(self._claims)
            if free <= 0:
                await self._until(self._slot_freed.wait())
                self._slot_freed.clear()
                continue
            try:
                claims, due = await self._queue.claim(self._info.id, free, self._settings.lease)
                for claim in claims:
                    self._start(claim)
                if not claims:
                    pause = MAX_IDLE_WAIT if due is None else min(due, MAX_IDLE_WAIT)
                    await self._until(self._queue.wait_for_work(pause))
            except Unavailable as exc:
                log.warning("claim_failed", error=str(exc))
                await self._pause()

    async def _until(self, waiting: Any) -> None:
        """Wait for something, but not beyond the start of draining."""
        drained = asyncio.ensure_future(self._draining.wait())
        waiter = asyncio.ensure_future(waiting)
        done, pending = await asyncio.wait({drained, waiter}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if waiter in done:
            waiter.result()

    def _start(self, claim: Claim) -> None:
        arq_id = "{" + claim.id.replace("-", "}-", 1)
        self._claims[arq_id] = claim
        self._stops[claim.id] = Stop()
        task = asyncio.create_task(self.run_job(arq_id, claim.created_at), name=f"job-{claim.id}")
        self.tasks[arq_id] = task
        task.add_done_callback(lambda _: self._forget(arq_id))

    def _forget(self, arq_id: str) -> None:
        task, claim = self.tasks.pop(arq_id), self._claims.pop(arq_id)
        self._stops.pop(claim.id)
        self._decisions.pop(arq_id, None)
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # What run_job raises is the queue server's failing; the lease runs out and the job is run again.
            log.error("run_job_failed", job=claim.id, error=repr(error))

    async def _generate(self, ctx: dict[str, Any], job_id: str) -> None:
        arq_id = ctx["job_id"]
        self._decisions[arq_id] = await self._runner.run(self._claims[arq_id], self._stops[job_id])

    async def finish_job(self, job_id: str, *_: Any) -> None:
        """Write the runner's decision, however long the server stays away; the fence guards what is stale."""
        claim, decision = self._claims[job_id], self._decisions.get(job_id, NO_DECISION)
        while True:
            try:
                await self._write(claim, decision)
                return
            except LeaseLost:
                log.warning("result_discarded", job=claim.id, fence=claim.fence)
                return
            except Unavailable as exc:
                log.warning("finish_retried", job=claim.id, error=str(exc))
                await self._pause()

    async def finish_failed_job(self, job_id: str, result_data: bytes | None) -> None:
        """arq could not even start it (payload gone or broken): give the claim back, spent."""
        await self.finish_job(job_id)

    async def _write(self, claim: Claim, decision: Decision) -> None:
        match decision:
            case Outcome():
                await self._queue.finish(claim, decision)
            case Release(why, spent, delay):
                await self._queue.release(claim, why, spent=spent, delay=delay)
            case Lost():
                return

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.beat)
            try:
                await self._beat_once()
            except Unavailable as exc:
                log.warning("beat_failed", error=str(exc))

    async def _beat_once(self) -> None:
        claims = list(self._claims.values())
        ttl = 2 * self._settings.lease
        stops = await self._queue.beat(self._info, claims, lease=self._settings.lease, ttl=ttl)
        for job_id, reason in stops.items():
            if stop := self._stops.get(job_id):
                stop.set(reason)

    async def _obey_forever(self) -> None:
        """Stop jobs as soon as somebody asks; the beat tells the same, later, if this list is lost."""
        while True:
            try:
                told = await self._queue.next_stop(self._info.id, MAX_IDLE_WAIT)
            except Unavailable:
                await self._pause()
                continue
            if told is not None and (stop := self._stops.get(told[0])):
                stop.set(told[1])

    async def _pause(self) -> None:
        """Between two tries to reach the server; jittered, so that a fleet does not return as one."""
        await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311

    async def _finish_running(self) -> None:
        if self.tasks:
            log.info("draining", jobs=len(self.tasks), seconds=self._settings.drain_timeout)
            await asyncio.wait(self.tasks.values(), timeout=self._settings.drain_timeout)
        for stop in self._stops.values():
            stop.set(StopReason.SHUTDOWN)
        if self.tasks:
            await asyncio.wait(self.tasks.values())

    async def _sign_off(self) -> None:
        """Leave the list of workers, and pass on a wake token that may have been taken on the way out."""
        try:
            await self._queue.sign_off(self._info.id)
        except Unavailable as exc:
            log.warning("sign_off_failed", error=str(exc))

"""arq's worker with our own way of getting jobs: claims by script, woken by a list, under a lease and a fence.

arq's ``run_job`` is kept: it takes the payload, runs the function and calls ``finish_job``, which is where the
runner's decision is written. arq's polling, tries, time limits, signals and results are switched off.
"""

import asyncio
import math
import random
from collections.abc import Coroutine
from typing import Any, Final

import msgspec
import structlog
from arq.worker import Worker, func
from opentelemetry.trace import Span

from img2img import telemetry, tracing
from img2img.errors import LeaseLost, Unavailable
from img2img.jobs import Failure, JobState, Outcome, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim, WorkerInfo
from img2img.settings import Settings
from worker.attempt import StageClock, Stop
from worker.engines.base import Engine
from worker.heart import RETRY_SECONDS, Heart
from worker.payloads import ClaimedPayloads
from worker.runner import Decision, JobRunner, Lost, Release

NEVER: Final = 30 * 24 * 3600
MAX_IDLE_WAIT: Final = 5.0
NO_DECISION: Final = Release(Failure("engine_failed", "The attempt ended without a decision"), "failures")

log = structlog.get_logger(__name__)


class Consumer(Worker):
    """Claims and runs jobs until drained, for as many at once as ``engine`` makes use of: ``await main()``."""

    def __init__(
        self, queue: JobQueue, runner: JobRunner, engine: Engine, info: WorkerInfo, settings: Settings
    ) -> None:
        super().__init__(
            functions=[func(self._generate, name="generate", timeout=NEVER, max_tries=NEVER)],
            queue_name=queue.alive_key,
            redis_pool=queue.redis,
            handle_signals=False,
            job_serializer=msgspec.json.encode,
            job_deserializer=msgspec.json.decode,
            keep_result=0,  # the terminal script writes it
            log_results=False,
        )
        self._queue = queue
        self._runner = runner
        self._engine = engine
        self._info = info
        self._slots = info.slots
        self._settings = settings
        # Held claims by fence: after a lost lease a job can be claimed again while its old attempt still stops.
        self._held: dict[int, Claim] = {}
        self._stops: dict[int, Stop] = {}
        self._clocks: dict[int, StageClock] = {}
        # The attempt that arq runs, by arq's job id; a job's attempts run one after another.
        self._running: dict[str, Claim] = {}
        self._pool: Any = ClaimedPayloads(self._running)
        self._decisions: dict[int, Decision] = {}
        self._claim_number = 0
        self._heart = Heart(queue.name, info, settings, self._stop_jobs)
        self._draining = asyncio.Event()
        self._wait: asyncio.Task[object] | None = None
        self._slots_free = asyncio.Event()
        # When draining began, and when what still ran was interrupted (the loop's clock).
        self._drained_at = self._interrupted_at = math.inf

    async def main(self) -> None:
        """Run until :meth:`drain`; a side task that dies takes the worker down with it, as does its heart."""
        lease = self._settings.lease
        await self._queue.beat(self._info, (), lease=lease, ttl=2 * lease)
        log.info("worker_ready", worker=self._info.id, engine=self._info.engine, model=self._info.model)
        async with self._heart, asyncio.TaskGroup() as group:
            beat = group.create_task(self._heart.beating(), name="beat")
            control = group.create_task(self._obey_forever(), name="control")
            slots = group.create_task(self._follow_slots(), name="slots")
            lag = group.create_task(telemetry.measure_lag(), name="lag")
            claiming = group.create_task(self._claim_until_drained(), name="claim")
            await self._draining.wait()
            # Shutdown: nothing new is claimed from here; running jobs get their time, then are
            # interrupted and handed back; the heart keeps their leases until the last one is written.
            self._heart.drain()
            await asyncio.wait({claiming}, timeout=lease)
            claiming.cancel()
            await self._finish_running()
            for side in (beat, control, slots, lag):
                side.cancel()
        await self._sign_off()

    def drain(self) -> None:
        """Stop claiming; ``main`` returns when the running jobs are done or handed back."""
        if not self._draining.is_set():
            self._drained_at = self.loop.time()
            self._draining.set()
            if self._wait is not None:
                self._wait.cancel()

    @property
    def readiness(self) -> str:
        """``ready`` while it claims jobs, else what keeps it from that; from any thread."""
        if self._draining.is_set():
            return "draining"
        return "ready" if self._heart.is_heard else "queue server unavailable"

    def stop_beating(self) -> None:
        """Let the leases run out, so that the jobs run elsewhere; from any thread."""
        self._heart.stop()

    async def _claim_until_drained(self) -> None:
        while not self._draining.is_set():
            free = self._free_slots()
            if free <= 0:
                await self._until(self._slots_free.wait())
                self._slots_free.clear()
                continue
            try:
                # The number changes only when there was an answer: a lost one is asked for again.
                token = str(self._claim_number)
                engine, held = f"{self._info.engine}/{self._info.model}", tuple(self._held.values())
                claims, due = await self._queue.claim(
                    self._info.id, free, self._settings.lease, token, engine=engine, held=held
                )
                self._claim_number += 1
                for claim in claims:
                    self._start(claim)
                if not claims and self._free_slots() > 0:
                    pause = MAX_IDLE_WAIT if due is None else min(due, MAX_IDLE_WAIT)
                    await self._until(self._queue.wait_for_work(pause))
            except Unavailable as exc:
                log.warning("claim_failed", error=str(exc))
                await self._pause()

    def _free_slots(self) -> int:
        if len(self._held) == 1 and next(iter(self._held.values())).suspect:
            return 0
        return self._slots - len(self._held)

    async def _follow_slots(self) -> None:
        """Take the engine's word for how many jobs it can make use of, and pass it on; claims beyond it go on."""
        while True:
            self._slots = self._engine.slots(self._settings.concurrency)
            self._heart.tell_slots(self._slots)
            telemetry.WORKER_SLOTS.set(self._slots)
            if self._free_slots() > 0:
                self._slots_free.set()
            elif self._wait is not None:
                # Whoever takes no job must not take the wake token of one either.
                self._wait.cancel()
            await self._engine.slots_changed(self._slots)

    async def _until(self, waiting: Coroutine[Any, Any, object]) -> None:
        """Wait for something, but not beyond the start of draining, or the moment when no slot is free any more."""
        self._wait = asyncio.create_task(waiting, name="wait")
        if self._draining.is_set():
            self._wait.cancel()
        try:
            await self._wait
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
        finally:
            self._wait.cancel()

    def _start(self, claim: Claim) -> None:
        arq_id = "{" + claim.id.replace("-", "}-", 1)
        self._held[claim.fence] = claim
        self._stops[claim.fence] = Stop()
        self._tell_held()
        before = self.tasks.get(arq_id)
        task = asyncio.create_task(self._run_after(before, arq_id, claim), name=f"job-{claim.id}")
        self.tasks[arq_id] = task
        task.add_done_callback(lambda done: self._forget(arq_id, claim, done))

    async def _run_after(self, before: asyncio.Task[None] | None, arq_id: str, claim: Claim) -> None:
        """Run an attempt once the one before it, whose lease was lost, has stopped."""
        if before is not None:
            for fence, held in self._held.items():
                if held.id == claim.id and fence != claim.fence:
                    self._stops[fence].set(StopReason.LEASE_LOST)
            await asyncio.wait({before})
        self._running[arq_id] = claim
        engine = f"{self._info.engine}/{self._info.model}"
        with tracing.process_span(self._queue.name, claim.spec, claim.attempt, engine) as span:
            clock = self._clocks[claim.fence] = StageClock((claim.claimed_at - claim.created_at) / 1000)
            try:
                await self.run_job(arq_id, claim.created_at)
            finally:
                _close(span, clock, self._decisions.get(claim.fence, NO_DECISION))

    def _forget(self, arq_id: str, claim: Claim, task: asyncio.Task[None]) -> None:
        if self.tasks.get(arq_id) is task:
            del self.tasks[arq_id]
            self._running.pop(arq_id, None)
        del self._held[claim.fence], self._stops[claim.fence]
        self._tell_held()
        self._decisions.pop(claim.fence, None)
        self._clocks.pop(claim.fence, None)
        self._slots_free.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # What run_job raises is the queue server's failing; the lease runs out and the job is run again.
            log.error("run_job_failed", job=claim.id, error=repr(error))

    async def _generate(self, ctx: dict[str, Any], job_id: str) -> None:
        claim = self._running[ctx["job_id"]]
        stop, clock = self._stops[claim.fence], self._clocks[claim.fence]
        self._decisions[claim.fence] = await self._runner.run(claim, stop, clock)

    def _tell_held(self) -> None:
        self._heart.held = tuple(self._held.values())
        telemetry.WORKER_BUSY.set(len(self._held))

    async def finish_job(self, job_id: str, *_: Any) -> None:
        """Write the runner's decision, however long the server stays away; the fence guards what is stale.

        A worker that was told to stop gives up a lease after its jobs were interrupted: they run again elsewhere.
        """
        claim = self._running[job_id]
        decision = self._decisions.get(claim.fence, NO_DECISION)
        began = self.loop.time()
        while self.loop.time() - max(began, self._interrupted_at) < self._settings.lease:
            try:
                async with asyncio.timeout(self._settings.lease if self._draining.is_set() else None):
                    await self._write(claim, decision)
            except LeaseLost:
                telemetry.CLAIMS_LOST.inc()
                log.warning("result_discarded", job=claim.id, fence=claim.fence)
                self._decisions[claim.fence] = Lost()
                return
            except (Unavailable, TimeoutError) as exc:
                log.warning("finish_retried", job=claim.id, error=str(exc))
                await self._pause()
            else:
                self._runner.note(claim, decision)
                return
        log.error("finish_given_up", job=claim.id, fence=claim.fence)

    async def finish_failed_job(self, job_id: str, result_data: bytes | None) -> None:
        """Where arq could not start a job: give the claim back, as a failure."""
        await self.finish_job(job_id)

    async def _write(self, claim: Claim, decision: Decision) -> None:
        match decision:
            case Outcome():
                await self._queue.finish(claim, decision)
            case Release(why, kind, delay):
                await self._queue.release(claim, why, kind, delay=delay)
            case Lost():
                return

    def _stop_jobs(self, stops: dict[int, StopReason]) -> None:
        for fence, reason in stops.items():
            if stop := self._stops.get(fence):
                stop.set(reason)

    async def _obey_forever(self) -> None:
        """Stop jobs as soon as somebody asks: the beat tells which, at once, or later if a word here is lost.

        A word may have been meant for an earlier attempt, before a replay: only the record knows.
        """
        while True:
            try:
                told = await self._queue.next_stop(self._info.id, MAX_IDLE_WAIT)
            except Unavailable:
                await self._pause()
            else:
                if told is not None:
                    self._heart.beat_now()

    async def _pause(self) -> None:
        """Between two tries to reach the server; jittered, so that a fleet does not return as one."""
        await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311

    async def _finish_running(self) -> None:
        if self.tasks:
            log.info("draining", jobs=len(self.tasks), seconds=self._settings.drain_timeout)
            left = self._drained_at + self._settings.drain_timeout - self.loop.time()
            await asyncio.wait(self.tasks.values(), timeout=max(left, 0))
        self._interrupted_at = self.loop.time()
        for stop in self._stops.values():
            stop.set(StopReason.SHUTDOWN)
        if self.tasks:
            await asyncio.wait(self.tasks.values())

    async def _sign_off(self) -> None:
        """Leave the list of workers, and pass on a wake token that may have been taken on the way out."""
        try:
            async with asyncio.timeout(self._settings.lease):
                await self._queue.sign_off(self._info.id)
        except (Unavailable, TimeoutError) as exc:
            log.warning("sign_off_failed", error=str(exc))


def _close(span: Span, clock: StageClock, decision: Decision) -> None:
    """Have an attempt's span say how it ended, and where its time went."""
    clock.close()
    match decision:
        case Outcome(state=state, error=error):
            clock.observe()
            span.set_attribute("img2img.outcome", state.value)
            if error is not None and state == JobState.FAILED:
                tracing.fail(span, error.code)
        case Release(why=why, kind=kind):
            span.set_attribute("img2img.outcome", "released")
            span.set_attribute("img2img.released.code", why.code)
            if kind == "failures":
                tracing.fail(span, why.code)
        case Lost():
            span.set_attribute("img2img.outcome", "lost")

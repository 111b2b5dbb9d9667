"""One job from claim to decision: load, decode, generate, encode, store. It writes no terminal state itself.

``JobRunner.run`` answers with a decision (the job's outcome, or its release for another attempt), which
the claim's holder then writes in one fenced step.
"""

import asyncio
import hashlib
import random
import time
from contextlib import aclosing
from typing import Final, Literal

import msgspec
import structlog

from img2img import telemetry, tracing
from img2img.blobs import BlobStore
from img2img.errors import (
    AttemptTimeout,
    EngineFailed,
    Img2ImgError,
    InputGone,
    InvalidRequest,
    JobCanceled,
    JobError,
    JobExpired,
    LeaseLost,
    SpendCapReached,
    UpstreamBusy,
)
from img2img.jobs import Failure, JobSpec, JobState, OnLost, Outcome, Result, Stage, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim
from img2img.requests import Inputs
from img2img.server import milliseconds
from img2img.settings import Settings
from img2img.sizes import resolve_size
from worker.attempt import Attempt, StageClock, Stop
from worker.engines.base import (
    Answered,
    Checkpoint,
    Engine,
    Image,
    Notice,
    Pictures,
    Preview,
    Progress,
    Sent,
    Shared,
    Task,
)
from worker.images import decode_inputs, encode_picture
from worker.metadata import describe
from worker.reports import Reports
from worker.safety import SafetyChecker, check_picture
from worker.watchdog import JobWatch, Watchdog

MAX_RETRY_DELAY: Final = 60.0
MAX_DOUBLINGS: Final = 20

log = structlog.get_logger(__name__)


class Release(msgspec.Struct, frozen=True):
    """The job goes back into the queue; ``kind`` is what the attempt counts as, ``delay`` is in seconds."""

    why: Failure
    kind: Literal["failures", "interruptions"]
    delay: float = 0.0


class Lost(msgspec.Struct, frozen=True):
    """Somebody else holds the job now: nothing may be written."""


Decision = Outcome | Release | Lost


class JobRunner:
    """Runs claimed jobs on one engine, each in an attempt of its own, which the watchdog watches."""

    def __init__(
        self,
        queue: JobQueue,
        blobs: BlobStore,
        engine: Engine,
        settings: Settings,
        worker: str,
        watchdog: Watchdog | None = None,
        checker: SafetyChecker | None = None,
    ) -> None:
        self._queue = queue
        self._blobs = blobs
        self._engine = engine
        self._settings = settings
        self._checker = checker
        self._executed_by = f"{engine.info.name}/{engine.info.model} on {worker}"
        # One that is never opened watches nothing.
        self._watchdog = watchdog or Watchdog(settings.stall_limit, settings.phase_limit)
        self._waiting: set[JobWatch] = set()
        for state in JobState:
            if state.is_terminal:  # from 0, so that the first one is an increase
                telemetry.JOBS_COMPLETED.labels(state.value, engine.info.name)

    async def run(self, claim: Claim, stop: Stop, clock: StageClock) -> Decision:
        """Make the picture, or say why not; never raises for what can go wrong with a job.

        ``clock`` is left in the stage ``FINISH``: what is decided is still to be written.
        """
        with self._watchdog.job(claim.id) as watch:
            attempt = Attempt(claim, self._executed_by, watch, stop, clock)
            try:
                return await self._make_or_stop(attempt)
            except Img2ImgError as exc:
                return self._decide(attempt, exc)
            except Exception:
                log.exception("attempt_failed", job=claim.id)
                failed = EngineFailed("The engine failed unexpectedly: see the worker's log")
                return self._decide(attempt, failed)

    async def _make_or_stop(self, attempt: Attempt) -> Outcome:
        """Make the picture, unless told to stop or out of time first.

        Raises:
            JobCanceled, JobExpired, AttemptTimeout, LeaseLost, Interrupted: why it stopped.
        """
        claim, stop, allowed = attempt.claim, attempt.stop, self._settings.attempt_timeout
        to_deadline = (claim.expires_at - claim.claimed_at) / 1000
        ends = time.monotonic() + min(to_deadline, allowed)
        work = asyncio.create_task(self._make(attempt), name=f"make-{claim.id}")
        stopped = asyncio.create_task(stop.wait(), name=f"stop-{claim.id}")
        try:
            await asyncio.wait({work, stopped}, timeout=min(to_deadline, allowed), return_when=asyncio.FIRST_COMPLETED)
            why = stop.reason  # what comes later is not what stopped it
            if why is StopReason.SHUTDOWN:
                # The engine may end its step and leave a checkpoint: a dead worker would keep its job for as long.
                attempt.interrupt.set()
                left = max(0.0, ends - time.monotonic())
                await asyncio.wait({work}, timeout=min(self._settings.lease, left))
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                return work.result()
        finally:
            stopped.cancel()
            work.cancel()
        if why is not None:
            raise _interruption(why)
        if to_deadline <= allowed:
            raise _interruption(StopReason.DEADLINE)
        raise AttemptTimeout(f"The attempt took longer than {allowed:g} s")

    async def _make(self, attempt: Attempt) -> Outcome:
        spec = attempt.claim.spec
        inputs = await self._load(attempt, spec.inputs)
        attempt.enter(Stage.DECODE)
        limits = self._settings.request_limits.pictures
        pictures = Pictures() if inputs is None else await asyncio.to_thread(decode_inputs, inputs, limits)
        resume = await self._resume(attempt)
        async with Reports(self._queue, self._blobs, attempt, self._settings) as reports:
            image = await self._generate(attempt, pictures, resume, reports)
        if self._checker is not None:
            attempt.enter(Stage.CHECK)
            await check_picture(self._checker, image.picture)
        attempt.enter(Stage.ENCODE)
        data = await asyncio.to_thread(self._encode, spec, image)
        attempt.enter(Stage.STORE)
        result = await self._store(attempt, image, data)
        return attempt.outcome(JobState.SUCCEEDED, result=result)

    async def _load(self, attempt: Attempt, key: str | None) -> Inputs | None:
        if key is None:
            return None
        data = await attempt.patiently(lambda: self._blobs.get(key))
        if data is None:
            raise InputGone("The job's input picture is no longer stored: send the request again")
        return msgspec.msgpack.decode(data, type=Inputs)

    async def _resume(self, attempt: Attempt) -> Checkpoint | None:
        """The state that an earlier attempt left; None where there is none any more, so that the work begins anew."""
        stored = attempt.claim.checkpoint
        if stored is None:
            return None
        data = await attempt.patiently(lambda: self._blobs.get(stored.blob))
        if data is None:
            log.warning("checkpoint_missing", job=attempt.claim.id, step=stored.step)
            return None
        return Checkpoint(stored.step, stored.steps, data)

    async def _generate(
        self, attempt: Attempt, pictures: Pictures, resume: Checkpoint | None, reports: Reports
    ) -> Image:
        """Iterate over the engine's outputs up to its picture.

        Raises:
            Interrupted: the engine ended where another attempt can go on; its checkpoint is stored.
            EngineFailed: it ended without a picture for no reason.
        """
        task = self._task(attempt, pictures)
        attempt.running = msgspec.structs.replace(attempt.running, width=task.width, height=task.height)
        self._waiting.add(attempt.watch)
        generated = self._engine.generate(task, pictures, resume, attempt.interrupt)
        try:
            async with aclosing(generated) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    self._served(attempt.watch)
                    match output:
                        case Progress():
                            self._progress(attempt, output, task, resume)
                            reports.progress(output)
                        case Preview():
                            reports.preview(output)
                        case Checkpoint():
                            reports.checkpoint(output)
                        case Notice() | Shared():
                            attempt.note(output)
                        case Sent():
                            attempt.calls += 1
                            await self._mark_sent(attempt, output.on_lost)
                        case Answered():
                            await self._mark_sent(attempt, None, billed=output.billed)
                        case Image():
                            return output
        finally:
            self._served(attempt.watch)
        if not attempt.interrupt.is_set():
            raise EngineFailed("The engine ended without a picture")
        await reports.all_stored()
        raise _interruption(StopReason.SHUTDOWN)

    async def _mark_sent(self, attempt: Attempt, on_lost: OnLost | None, *, billed: bool = False) -> None:
        """Have it on record that a call may be billed, or not any more; until then the engine waits.

        Raises:
            JobCanceled, Interrupted, LeaseLost: the job is to stop, and no call to be made.
            SpendCapReached: no call is to be made today.
        """
        reason = await attempt.patiently(lambda: self._queue.sent(attempt.claim, attempt.calls, on_lost, billed=billed))
        if reason is not None:
            raise _interruption(reason)

    def _progress(self, attempt: Attempt, progress: Progress, task: Task, resume: Checkpoint | None) -> None:
        if resume is not None and progress.stage == Stage.STEPS and attempt.running.stage != Stage.STEPS:
            if progress.step > 0:
                log.info("job_resumed", job=attempt.claim.id, step=progress.step)
            else:  # another release's, or another model's
                log.warning("checkpoint_unfit", job=attempt.claim.id, step=resume.step)
        attempt.clock.enter(progress.stage)
        attempt.watch.progress(progress, (task.width, task.height))

    def _served(self, watch: JobWatch) -> None:
        """The engine gets on with one job: a sign of life of those, too, that wait for their turn at it."""
        self._waiting.discard(watch)
        for waiting in self._waiting:
            waiting.renew()

    def _task(self, attempt: Attempt, pictures: Pictures) -> Task:
        spec = attempt.claim.spec
        asked, options = spec.parameters, spec.options
        source = None if pictures.image is None else pictures.image.size
        width, height = resolve_size(asked.width, asked.height, self._engine.info.native_size, source)
        return Task(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt or "",
            width=width,
            height=height,
            num_steps=asked.num_steps,
            strength=asked.strength,
            guidance=asked.guidance,
            seed=spec.seed,
            sampler=options.sampler,
            reproducible=options.reproducible,
            # What was not checked is shown to nobody.
            previews=options.previews and self._checker is None,
            deadline=attempt.deadline,
        )

    def _encode(self, spec: JobSpec, image: Image) -> bytes:
        metadata = describe(spec, image) if self._settings.image_metadata else None
        return encode_picture(image.picture, spec.options.output_format, spec.options.output_quality, metadata)

    async def _store(self, attempt: Attempt, image: Image, data: bytes) -> Result:
        claim = attempt.claim
        key = f"result:{claim.id}.{claim.fence}"
        expires_at = int(time.time() * 1000) + milliseconds(self._settings.result_retention)
        await attempt.patiently(lambda: self._blobs.put(key, data, expires_at))
        return Result(
            blob=key,
            media_type=claim.spec.options.output_format.media_type,
            width=image.picture.width,
            height=image.picture.height,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            expires_at=expires_at,
            receipt=image.receipt,
            upstream=image.upstream,
        )

    def _decide(self, attempt: Attempt, error: Img2ImgError) -> Decision:
        attempt.clock.enter(Stage.FINISH)
        # What a library says may hold what no JSON can.
        failure = Failure(error.code, str(error).encode("utf-8", "replace").decode())
        match error:
            case LeaseLost():
                return Lost()
            case JobCanceled():
                return attempt.outcome(JobState.CANCELED, failure)
            case JobExpired():
                return attempt.outcome(JobState.EXPIRED, failure)
            case Interrupted():
                return Release(failure, "interruptions")
            case InvalidRequest() | JobError(retryable=False):
                return attempt.outcome(JobState.FAILED, failure)
            case UpstreamBusy() | SpendCapReached() if self._is_vain(attempt, error.retry_after):
                # Sooner said than waited for.
                return attempt.outcome(JobState.FAILED, failure)
            case UpstreamBusy() | SpendCapReached():
                return Release(failure, "interruptions", delay=error.retry_after)
            case _:
                return Release(failure, "failures", delay=self._retry_delay(attempt.claim.failures))

    def _is_vain(self, attempt: Attempt, seconds: float) -> bool:
        """Whether waiting so long cannot help: another pool may still take a job that may go there."""
        return not attempt.claim.may_go_elsewhere and time.monotonic() + seconds >= attempt.deadline

    def _retry_delay(self, failures: int) -> float:
        """Exponential back-off with full jitter, in seconds."""
        ceiling = min(MAX_RETRY_DELAY, self._settings.retry_delay * 2 ** min(failures, MAX_DOUBLINGS))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - no secret depends on it

    def note(self, claim: Claim, decision: Decision) -> None:
        """Count and log a decision that has been written."""
        match decision:
            case Outcome():
                self._count(claim, decision)
                code = None if decision.error is None else decision.error.code
                log.info("job_ended", job=claim.id, state=decision.state.value, code=code)
            case Release():
                log.info("job_released", job=claim.id, code=decision.why.code, counted_as=decision.kind)
            case Lost():
                telemetry.CLAIMS_LOST.inc()
                log.warning("lease_lost", job=claim.id, fence=claim.fence)

    def _count(self, claim: Claim, outcome: Outcome) -> None:
        telemetry.JOBS_COMPLETED.labels(outcome.state.value, self._engine.info.name).inc()
        seconds, sent = sum(outcome.timings.values()), tracing.propagator.extract(claim.spec.trace)
        telemetry.observe(telemetry.JOB_SECONDS.labels(outcome.state.value), seconds, sent)


class Interrupted(JobError):
    """The worker is shutting down; the job goes back without losing an attempt."""

    code = "interrupted"


def _interruption(reason: StopReason) -> Img2ImgError:
    match reason:
        case StopReason.USER | StopReason.DISCONNECT:
            return JobCanceled(f"Canceled: {reason.value}")
        case StopReason.DEADLINE:
            return JobExpired("The deadline passed while the job was running")
        case StopReason.SHUTDOWN:
            return Interrupted("The worker is shutting down")
        case StopReason.LEASE_LOST:
            return LeaseLost("Another worker holds the job")

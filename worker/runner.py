"""One job from claim to decision: load, decode, generate, encode, store. It writes no terminal state itself.

``JobRunner.run`` answers with a decision (the job's outcome, or its release for another attempt), which
the claim's holder then writes in one fenced step.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Final, Literal, Self, TypeVar

import msgspec
import structlog
from opentelemetry.trace import StatusCode

from img2img import telemetry
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
    Unavailable,
)
from img2img.jobs import Failure, JobSpec, JobState, Outcome, Result, Running, Stage, StopReason
from img2img.queue import JobQueue
from img2img.queue_types import Claim
from img2img.requests import Inputs
from img2img.server import milliseconds
from img2img.settings import Settings
from worker.engines.base import Engine, Image, Notice, Pictures, Progress, Task
from worker.images import decode_inputs, encode_picture, resolve_size
from worker.metadata import describe
from worker.safety import SafetyChecker, check_picture
from worker.stages import StageClock
from worker.watchdog import JobWatch, Watchdog

MAX_RETRY_DELAY: Final = 60.0
MAX_DOUBLINGS: Final = 20
BLOB_RETRY_SECONDS: Final = (0.25, 0.75)
T = TypeVar("T")

log = structlog.get_logger(__name__)


class Release(msgspec.Struct, frozen=True):
    """The job goes back into the queue; ``kind`` is what the attempt counts as, ``delay`` is in seconds."""

    why: Failure
    kind: Literal["failures", "interruptions"]
    delay: float = 0.0


class Lost(msgspec.Struct, frozen=True):
    """Somebody else holds the job now: nothing may be written."""


Decision = Outcome | Release | Lost


class Stop:
    """Tells a running job to stop, once; later reasons change nothing."""

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self._event = asyncio.Event()

    def set(self, reason: StopReason) -> None:
        if self.reason is None:
            self.reason = reason
            self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


class Attempt:
    """What one attempt has gathered so far."""

    def __init__(self, claim: Claim, executed_by: str, watch: JobWatch) -> None:
        self.claim = claim
        self.watch = watch
        self.deadline = time.monotonic() + (claim.expires_at - claim.claimed_at) / 1000
        self.clock = StageClock((claim.claimed_at - claim.created_at) / 1000)
        self.running = Running(executed_by=executed_by)
        self.warnings = list(claim.spec.warnings)

    def enter(self, stage: Stage) -> None:
        self.clock.enter(stage)
        self.watch.enter(stage)

    def outcome(self, state: JobState, error: Failure | None = None, result: Result | None = None) -> Outcome:
        self.clock.close()
        self.clock.observe()
        return Outcome(
            state=state,
            result=result,
            error=error,
            timings={stage: round(seconds, 6) for stage, seconds in self.clock.seconds.items()},
            warnings=tuple(self.warnings),
            executed_by=self.running.executed_by,
        )


class Reporter:
    """Sends progress beside the work: at most one report under way, none sooner than ``interval`` seconds.

    A job that is done before the first interval reports nothing, and costs the server nothing.
    """

    def __init__(self, queue: JobQueue, attempt: Attempt, stop: Stop, interval: float) -> None:
        self._queue = queue
        self._attempt = attempt
        self._stop = stop
        self._interval = interval
        self._last = time.monotonic()
        self._sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sending is not None:
            if kind is not None:  # whoever interrupts the work does not wait for a silent server
                self._sending.cancel()
            await asyncio.wait({self._sending})

    def report(self, progress: Progress) -> None:
        """Note where the job is, and send it unless that would be too soon."""
        attempt, now = self._attempt, time.monotonic()
        attempt.running = msgspec.structs.replace(
            attempt.running, stage=progress.stage, step=progress.step, steps=progress.steps
        )
        busy = self._sending is not None and not self._sending.done()
        if not busy and now - self._last >= self._interval:
            self._last = now
            self._sending = asyncio.create_task(self._send(attempt.running), name=f"report-{attempt.claim.id}")

    async def _send(self, running: Running) -> None:
        try:
            reason = await self._queue.report(self._attempt.claim, running)
        except Unavailable:
            # Progress is worth nothing later; the work goes on and the terminal write decides.
            log.warning("report_skipped", job=self._attempt.claim.id)
            return
        if reason is not None:
            self._stop.set(reason)


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

    async def run(self, claim: Claim, stop: Stop) -> Decision:
        """Make the picture, or say why not; never raises for what can go wrong with a job."""
        with (
            telemetry.process_span(self._queue.name, claim.spec, claim.attempt) as span,
            self._watchdog.job(claim.id) as watch,
        ):
            attempt = Attempt(claim, self._executed_by, watch)
            try:
                decision: Decision = await self._make_or_stop(attempt, stop)
            except Img2ImgError as exc:
                decision = self._decide(attempt, exc)
            except Exception:
                log.exception("attempt_failed", job=claim.id)
                failed = EngineFailed("The engine failed unexpectedly: see the worker's log")
                decision = self._decide(attempt, failed)
            if isinstance(decision, Outcome) and decision.error is not None:
                span.set_attribute("error.type", decision.error.code)
                if decision.state == JobState.FAILED:
                    span.set_status(StatusCode.ERROR, decision.error.code)
            return decision

    async def _make_or_stop(self, attempt: Attempt, stop: Stop) -> Outcome:
        """Make the picture, unless told to stop or out of time first.

        Raises:
            JobCanceled, JobExpired, AttemptTimeout, LeaseLost, Interrupted: why it stopped.
        """
        claim, allowed = attempt.claim, self._settings.attempt_timeout
        to_deadline = (claim.expires_at - claim.claimed_at) / 1000
        work = asyncio.create_task(self._make(attempt, stop), name=f"make-{claim.id}")
        stopped = asyncio.create_task(stop.wait(), name=f"stop-{claim.id}")
        try:
            await asyncio.wait({work, stopped}, timeout=min(to_deadline, allowed), return_when=asyncio.FIRST_COMPLETED)
            why = stop.reason  # what comes later is not what stopped it
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

    async def _make(self, attempt: Attempt, stop: Stop) -> Outcome:
        spec = attempt.claim.spec
        inputs = await self._load(attempt, spec.inputs)
        attempt.enter(Stage.DECODE)
        limits = self._settings.request_limits.pictures
        pictures = Pictures() if inputs is None else await asyncio.to_thread(decode_inputs, inputs, limits)
        async with Reporter(self._queue, attempt, stop, self._settings.progress_interval) as reporter:
            image = await self._generate(attempt, pictures, reporter)
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
        data = await _patiently(attempt, lambda: self._blobs.get(key))
        if data is None:
            raise InputGone("The job's input picture is no longer stored: send the request again")
        return msgspec.msgpack.decode(data, type=Inputs)

    async def _generate(self, attempt: Attempt, pictures: Pictures, reporter: Reporter) -> Image:
        task = self._task(attempt, pictures)
        attempt.running = msgspec.structs.replace(attempt.running, width=task.width, height=task.height)
        self._waiting.add(attempt.watch)
        try:
            async with aclosing(self._engine.generate(task, pictures)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    self._served(attempt.watch)
                    match output:
                        case Progress():
                            attempt.clock.enter(output.stage)
                            attempt.watch.progress(output, (task.width, task.height))
                            reporter.report(output)
                        case Notice():
                            attempt.warnings.append(output.message)
                        case Image():
                            return output
        finally:
            self._served(attempt.watch)
        raise EngineFailed("The engine ended without a picture")

    def _served(self, watch: JobWatch) -> None:
        """The engine gets on with one job: a sign of life of those, too, that wait for their turn at it."""
        self._waiting.discard(watch)
        for waiting in self._waiting:
            waiting.renew()

    def _task(self, attempt: Attempt, pictures: Pictures) -> Task:
        spec = attempt.claim.spec
        asked, options = spec.parameters, spec.options
        width, height = resolve_size(asked.width, asked.height, self._engine.info.native_size, pictures.image)
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
            deadline=attempt.deadline,
        )

    def _encode(self, spec: JobSpec, image: Image) -> bytes:
        metadata = describe(spec, image) if self._settings.image_metadata else None
        return encode_picture(image.picture, spec.options.output_format, spec.options.output_quality, metadata)

    async def _store(self, attempt: Attempt, image: Image, data: bytes) -> Result:
        claim = attempt.claim
        key = f"result:{claim.id}.{claim.fence}"
        expires_at = int(time.time() * 1000) + milliseconds(self._settings.result_retention)
        await _patiently(attempt, lambda: self._blobs.put(key, data, expires_at))
        return Result(
            blob=key,
            media_type=claim.spec.options.output_format.media_type,
            width=image.picture.width,
            height=image.picture.height,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            expires_at=expires_at,
            receipt=image.receipt,
        )

    def _decide(self, attempt: Attempt, error: Img2ImgError) -> Decision:
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
                attempt.clock.close()
                return Release(failure, "interruptions")
            case InvalidRequest() | JobError(retryable=False):
                return attempt.outcome(JobState.FAILED, failure)
            case _:
                attempt.clock.close()
                return Release(failure, "failures", delay=self._retry_delay(attempt.claim.failures))

    def _retry_delay(self, failures: int) -> float:
        """Exponential back-off with full jitter, in seconds."""
        ceiling = min(MAX_RETRY_DELAY, self._settings.retry_delay * 2 ** min(failures, MAX_DOUBLINGS))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - no secret depends on it

    def note(self, claim: Claim, decision: Decision) -> None:
        """Count and log a decision that has been written."""
        match decision:
            case Outcome():
                telemetry.JOBS_COMPLETED.labels(decision.state.value, self._engine.info.name).inc()
                code = None if decision.error is None else decision.error.code
                log.info("job_ended", job=claim.id, state=decision.state.value, code=code)
            case Release():
                log.info("job_released", job=claim.id, code=decision.why.code, counted_as=decision.kind)
            case Lost():
                log.warning("lease_lost", job=claim.id, fence=claim.fence)


async def _patiently(attempt: Attempt, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a blob's transfer while the store cannot be reached: the picture is worth more than the wait.

    The attempt's own limits end it: deadline, time limit, a lost lease, a cancel.
    """
    while True:
        try:
            return await call()
        except Unavailable as exc:
            log.warning("blob_retried", error=str(exc))
            attempt.watch.renew()
            await asyncio.sleep(random.uniform(*BLOB_RETRY_SECONDS))  # noqa: S311


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

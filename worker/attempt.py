"""One attempt at a job: why it is to stop, where its time goes, and what it has gathered so far."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from img2img import telemetry, tracing
from img2img.errors import Unavailable
from img2img.jobs import Failure, JobState, Outcome, Result, Running, Stage, StopReason
from img2img.queue_types import Claim
from worker.engines.base import Notice, Shared
from worker.watchdog import JobWatch

BLOB_RETRY_SECONDS: Final = (0.25, 0.75)
T = TypeVar("T")

log = structlog.get_logger(__name__)


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


class StageClock:
    """Where an attempt's time goes: seconds per stage, without gaps, one stage ending where the next begins.

    ``queued`` is in seconds. The stages' spans are made from the same measurements, all of them when the attempt ends:
    exported sooner, they would hang in the air if the worker died before the attempt's own span was.
    """

    def __init__(self, queued: float) -> None:
        self.seconds: dict[Stage, float] = {Stage.QUEUED: max(0.0, queued)}
        self._stage = Stage.LOAD
        self._since = time.perf_counter_ns()
        self._to_epoch = time.time_ns() - self._since
        self._past: list[tuple[Stage, int, int]] = []
        self._steps: dict[str, float] = {}

    def enter(self, stage: Stage) -> None:
        if stage != self._stage:
            self._leave()
            self._stage = stage

    def shared(self, passes: int, rows: float) -> None:
        """The job's steps were taken in so many passes, of so many rows on average, its own among them."""
        self._steps = {"img2img.passes": passes, "img2img.pass.rows.mean": round(rows, 2)}

    def close(self) -> None:
        """The attempt is over, and its span still the current one: each stage gets a span below that. Called once."""
        self._leave()
        for stage, began, ended in self._past:
            details = self._steps if stage is Stage.STEPS else None
            tracing.stage_span(stage, began + self._to_epoch, ended + self._to_epoch, details)

    def observe(self) -> None:
        for stage, seconds in self.seconds.items():
            telemetry.observe(telemetry.STAGE_SECONDS.labels(stage.value), seconds)

    def _leave(self) -> None:
        now = time.perf_counter_ns()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + (now - self._since) / 1e9
        self._past.append((self._stage, self._since, now))
        self._since = now


class Attempt:
    """What one attempt has gathered so far. ``interrupt`` asks the engine to end where another can go on.

    ``calls`` counts those of another service.
    """

    def __init__(self, claim: Claim, executed_by: str, watch: JobWatch, stop: Stop, clock: StageClock) -> None:
        self.claim = claim
        self.watch = watch
        self.stop = stop
        self.interrupt = asyncio.Event()
        self.deadline = time.monotonic() + (claim.expires_at - claim.claimed_at) / 1000
        self.clock = clock
        self.running = Running(executed_by=executed_by)
        self.warnings = list(claim.spec.warnings)
        self.calls = 0

    def enter(self, stage: Stage) -> None:
        self.clock.enter(stage)
        self.watch.enter(stage)

    def note(self, told: Notice | Shared) -> None:
        """Keep what the engine says beside its work: for the user, or for the trace."""
        if isinstance(told, Notice):
            self.warnings.append(told.message)
        else:
            self.clock.shared(told.passes, told.rows)

    def outcome(self, state: JobState, error: Failure | None = None, result: Result | None = None) -> Outcome:
        self.clock.enter(Stage.FINISH)
        return Outcome(
            state=state,
            result=result,
            error=error,
            timings={stage: round(seconds, 6) for stage, seconds in self.clock.seconds.items()},
            warnings=tuple(self.warnings),
            executed_by=self.running.executed_by,
        )

    async def patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a blob's transfer, or a word to the server, while it cannot be reached: the picture is worth the wait.

        The attempt's own limits end it: deadline, time limit, a lost lease, a cancel.
        """
        while True:
            try:
                return await call()
            except Unavailable as exc:
                log.warning("blob_retried", error=str(exc))
                self.watch.renew()
                await asyncio.sleep(random.uniform(*BLOB_RETRY_SECONDS))  # noqa: S311

"""One device: a thread that owns its model and makes pictures for many tasks at once, a step of several at a time.

The loop is: take in what has come, let go of what was stopped, do for single tasks what they need alone (encoding
prompt and picture, decoding the result) for about as long as a step takes, take one step of a batch. So a stop takes
effect within one step, a new task joins at the next, and what others need alone makes nobody's steps much longer than
double.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog
import torch

from img2img import telemetry
from img2img.errors import EngineFailed, Img2ImgError, ModelRefused
from img2img.jobs import Stage
from worker.engines.base import Checkpoint, Output, Pictures, Preview, Progress, Shared, Task
from worker.engines.diffusion.batcher import Batcher, Entry, Limits, Pass
from worker.engines.diffusion.checkpoints import save
from worker.engines.diffusion.graphs import free_memory
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.painting import is_out_of_memory, paint, translated_errors
from worker.engines.diffusion.previews import PreviewMap
from worker.engines.diffusion.sampling import Sampling, advance

BROKEN: Final = "The device or its driver failed: see the worker's log"
SIGN_SECONDS: Final = 1.0
"""How often tasks show a sign of life that are not in the batch."""

log = structlog.get_logger(__name__)


class Intervals(msgspec.Struct, frozen=True):
    """Seconds of work between a task's checkpoints (0: none but the last) and between its previews."""

    checkpoint: float = 5.0
    preview: float = 1.0


@dataclass(eq=False)
class Order:
    """A task in the lane. In the lane's thread ``tell`` is called with its outputs, and ``ended`` once with how it
    ended: None (done, stopped or interrupted) or the error.
    """

    task: Task
    pictures: Pictures
    resume: Checkpoint | None
    interrupt: asyncio.Event | None
    tell: Callable[[Output], None]
    ended: Callable[[Exception | None], None]
    stopped: threading.Event = field(default_factory=threading.Event)
    context: Context = field(default_factory=copy_context)
    """The job's: what the lane's thread logs of a task names its job and its trace."""

    @property
    def is_interrupted(self) -> bool:
        return self.interrupt is not None and self.interrupt.is_set()


@dataclass(eq=False)
class _Work:
    """An order that was taken in: how its picture is painted, and once it samples, its place in the batcher."""

    order: Order
    painting: Generator[Output | Sampling]
    sampling: Sampling | None = None
    entry: Entry | None = None
    checkpointed: float = field(default_factory=time.monotonic)
    previewed: float = 0.0
    passes: int = 0
    rows: int = 0
    """Of all of those passes, this order's own among them."""


class Lane:
    """Runs in the thread that calls :meth:`run`; ``submit``, ``close`` and ``load`` may be called from any thread."""

    def __init__(self, model: DiffusionModel, limits: Limits, intervals: Intervals, previews: PreviewMap) -> None:
        self.model = model
        self._limits = limits
        self._intervals = intervals
        self._previews = previews
        self._inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._batcher = Batcher(limits)
        self._alone: deque[_Work] = deque()
        """Those that need something for themselves, in turn."""
        self._sampling: dict[Entry, _Work] = {}
        self._closing = False
        self._broken = False
        self._pass_seconds = 0.0
        """What the last pass took."""
        self._signed = 0.0
        """When the others last had a sign of life."""

    def submit(self, order: Order) -> None:
        """Take in an order; it ends by ``order.ended``."""
        self._inbox.put(order)
        if self._broken:
            self._refuse_waiting(BROKEN)

    def close(self) -> None:
        """Fail what is there and let :meth:`run` return, after the step in progress."""
        self._closing = True
        self._inbox.put(None)

    @property
    def load(self) -> int:
        """How many orders are under way, roughly."""
        return len(self._alone) + len(self._sampling) + self._inbox.qsize()

    def run(self) -> None:
        """Work until :meth:`close`.

        Raises:
            Exception: the device is of no use any more, or this code is wrong; every order has failed.
        """
        try:
            with torch.inference_mode():
                while not self._closing:
                    self.turn()
        except Exception:
            self._broken = True
            self._drain(BROKEN)
            raise
        self._drain("The worker closed its engine before the picture was done")

    def turn(self) -> None:
        """Come round once: take in, let go, serve, step. With nothing to do it waits for an order."""
        self._take_in()
        self._let_go()
        self._serve_alone()
        if (batch := self._batcher.pick(time.monotonic())) is not None:
            self._step(batch)

    def _take_in(self) -> None:
        """Begin with what has come; with nothing else to do, wait for it."""
        while self._inbox.qsize() or not (self._alone or self._sampling or self._closing):
            order = self._inbox.get()
            if order is None:
                return
            rows = self._limits.fixed_rows if order.task.reproducible else None
            painting = paint(self.model, order.task, order.pictures, order.resume, rows)
            self._alone.append(_Work(order, painting))

    def _let_go(self) -> None:
        """End what was told to stop; an interrupted task leaves a checkpoint first, if it has begun to sample."""
        for work in [*self._alone, *self._sampling.values()]:
            order = work.order
            if not (order.stopped.is_set() or order.is_interrupted):
                continue
            if not order.stopped.is_set() and work.sampling is not None and work.sampling.step > 0:
                order.tell(save(work.sampling, order.task, self.model))
            self._end(work, None)

    def _serve_alone(self) -> None:
        """Do what single tasks need for themselves, for about as long as the last step took."""
        until = time.monotonic() + self._pass_seconds
        while self._alone:
            self._serve(self._alone.popleft())
            if time.monotonic() >= until:
                return

    def _serve(self, work: _Work) -> None:
        """Go on with one task up to its next output.

        Raises:
            Exception: what failed it, when the device is of no use any more.
        """
        try:
            output = work.order.context.run(next, work.painting, None)
        except Exception as exc:
            if self._is_lost(exc):
                self._end(work, EngineFailed(BROKEN))
                raise
            self._end(work, exc)
            return
        match output:
            case None:
                self._end(work, None)
            case Sampling():
                self._begin_sampling(work, output)
            case _:
                work.order.tell(output)
                self._alone.appendleft(work)

    def _is_lost(self, error: Exception) -> bool:
        """Whether the device failed, and not the task: else the lane would fail all that comes, one after another."""
        return not isinstance(error, ModelRefused) and not self.model.works()

    def _begin_sampling(self, work: _Work, sampling: Sampling) -> None:
        task = work.order.task
        left = sampling.steps - sampling.step
        work.sampling = sampling
        work.entry = Entry((task.width, task.height), sampling.rows, left, task.deadline, task.reproducible)
        self._go_on(work)

    def _go_on(self, work: _Work) -> None:
        """To the next step, or when all are taken to what comes after them."""
        if work.entry is None or work.sampling is None:
            return
        if work.sampling.is_done:
            if self._sampling.pop(work.entry, None) is not None:
                self._batcher.remove(work.entry)
            if work.passes:
                work.order.tell(Shared(work.passes, work.rows / work.passes))
            # Somebody waits for this one: before others begin.
            self._alone.appendleft(work)
        elif work.entry not in self._sampling:
            self._sampling[work.entry] = work
            self._batcher.add(work.entry)

    def _step(self, batch: Pass) -> None:
        """Take a step of each in the batch; what goes wrong with one of them is not the others' fault."""
        works = [self._sampling[entry] for entry in batch.entries]
        began = time.monotonic()
        try:
            errors = advance(self.model, [work.sampling for work in works if work.sampling], batch.rows)
        except Exception as exc:
            self._step_failed(batch, works, exc)
            return
        now = time.monotonic()
        self._note(batch, now, now - began)
        for work, error in zip(works, errors, strict=True):
            if error is not None:
                self._end(work, error)
            else:
                work.passes += 1
                work.rows += batch.filled
                self._report(work, now)
                self._go_on(work)

    def _note(self, batch: Pass, now: float, seconds: float) -> None:
        """What a pass took; every so often it is a sign of life of those, too, that were not in it."""
        self._pass_seconds = seconds
        self._batcher.took(batch, seconds)
        device = str(self.model.device)
        telemetry.ENGINE_BUSY_SECONDS.labels(device).inc(seconds)
        telemetry.ENGINE_PASSES.labels(device).inc()
        telemetry.ENGINE_ROWS.labels(device).inc(batch.filled)
        telemetry.BATCH_ROWS.labels(device).observe(batch.filled)
        if now - self._signed < SIGN_SECONDS:
            return
        self._signed = now
        telemetry.ENGINE_MEMORY_BYTES.labels(device).set(self.model.memory_bytes)
        for entry, work in self._sampling.items():
            if entry not in batch.entries and work.sampling is not None:
                work.order.tell(Progress(Stage.STEPS, work.sampling.step, work.sampling.steps))

    def _step_failed(self, batch: Pass, works: list[_Work], error: Exception) -> None:
        """Out of memory: smaller passes from now on. Anything else: each alone, to find whose fault it is.

        Raises:
            Exception: ``error``, when it is the device's.
        """
        if not self.model.works():
            raise error
        if is_out_of_memory(error) and self._batcher.shrink(batch):
            log.warning("pass_shrunk", size=batch.size, entries=len(batch.entries), rows=self._batcher.cap(batch.size))
            if self.model.device.type == "cuda":
                free_memory()
        elif len(works) == 1 or is_out_of_memory(error):
            self._fail(works[0], error)
        else:
            for entry in batch.entries:
                self._step(Pass(batch.size, (entry,), batch.rows))

    def _fail(self, work: _Work, error: Exception) -> None:
        try:
            work.order.context.run(self._translate, work, error)
        except Img2ImgError as exc:
            self._end(work, exc)

    def _translate(self, work: _Work, error: Exception) -> None:
        with translated_errors(work.order.task, self.model.device):
            raise error

    def _report(self, work: _Work, now: float) -> None:
        sampling, order = work.sampling, work.order
        if sampling is None:
            return
        order.tell(Progress(Stage.STEPS, sampling.step, sampling.steps))
        if sampling.is_done:
            return
        if order.task.previews and now - work.previewed >= self._intervals.preview and sampling.clean is not None:
            work.previewed = now
            order.tell(Preview(sampling.step, sampling.steps, self._previews.picture(sampling.clean)))
        if 0 < self._intervals.checkpoint <= now - work.checkpointed:
            work.checkpointed = now
            order.tell(save(sampling, order.task, self.model))

    def _end(self, work: _Work, error: Exception | None) -> None:
        """Forget it, and say how it ended."""
        work.painting.close()
        if work.entry is not None and self._sampling.pop(work.entry, None) is not None:
            self._batcher.remove(work.entry)
        elif work in self._alone:
            self._alone.remove(work)
        work.order.ended(error)

    def _drain(self, why: str) -> None:
        """Fail what is left, so that nobody waits for it."""
        for work in [*self._alone, *self._sampling.values()]:
            self._end(work, EngineFailed(why))
        self._refuse_waiting(why)

    def _refuse_waiting(self, why: str) -> None:
        with suppress(queue.Empty):
            while True:
                if (order := self._inbox.get_nowait()) is not None:
                    order.ended(EngineFailed(why))

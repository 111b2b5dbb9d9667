"""Ends a worker that hangs: a thread looks whether its event loop, its model and each of its jobs get on.

Native code cannot be interrupted, so a worker that hangs is ended as a whole, at once. Its beat ends with it, its
jobs run elsewhere once their leases have run out, and its supervisor starts another worker.
"""

import faulthandler
import math
import os
import threading
import time
from asyncio import get_running_loop
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, Self

import msgspec
import structlog

from img2img import tracing
from img2img.jobs import Stage
from worker.engines.base import Progress

STALLED_STATUS: Final = 75
"""The exit status of a worker that its watchdog ended: EX_TEMPFAIL, start another one."""
LONGEST_TICK: Final = 1.0
LAST_WORDS_SECONDS: Final = 1.0
STEP_FACTOR: Final = 10
STEP_WEIGHT: Final = 0.1

log = structlog.get_logger(__name__)
Size = tuple[int, int]


class Mark(msgspec.Struct, frozen=True):
    """What is being done, and how long it may take (seconds). Each sign of life is a mark of its own."""

    phase: str
    limit: float


class Hung(msgspec.Struct, frozen=True):
    """What has shown no sign of life for ``seconds``."""

    what: str
    phase: str
    seconds: float
    limit: float


class Watch:
    """One thing that has to get on. Marked by the thread that does the work, read by the watchdog's."""

    def __init__(self, what: str, mark: Mark) -> None:
        self.what = what
        self.mark = mark

    def enter(self, phase: str, limit: float) -> None:
        self.mark = Mark(phase, limit)

    def renew(self) -> None:
        """Show a sign of life in the same phase."""
        self.mark = Mark(self.mark.phase, self.mark.limit)


class StepLimits:
    """How long a step may take, from the steps that this worker has done: ten times their running mean.

    ``floor`` is the least limit. A size's first step, which may compile or tune, has at least ``first``; it is not
    measured. For a size without measured steps the nearest other size counts, scaled by its pixels. In seconds.
    """

    def __init__(self, floor: float, first: float) -> None:
        self._floor = floor
        self._first = first
        self._means: dict[Size, float | None] = {}

    def of(self, size: Size) -> float:
        """The limit of the next step at ``size``, a picture's (width, height)."""
        expected = self._expected(size)
        limit = max(self._floor, STEP_FACTOR * (expected or 0.0))
        is_new = expected is None or size not in self._means
        return max(limit, self._first) if is_new else limit

    def measured(self, size: Size, seconds: float) -> None:
        """A step was done."""
        if size not in self._means:
            self._means[size] = None
            return
        mean = self._means[size]
        self._means[size] = seconds if mean is None else mean + STEP_WEIGHT * (seconds - mean)

    def _expected(self, size: Size) -> float | None:
        if own := self._means.get(size):
            return own
        pixels = size[0] * size[1]
        known = [(width * height, mean) for (width, height), mean in self._means.items() if mean]
        if not known:
            return None
        nearest, mean = min(known, key=lambda entry: abs(entry[0] - pixels))
        return mean * pixels / nearest


class JobWatch:
    """Watches one attempt: its stages have the phase limit, its steps the one learnt for their size."""

    def __init__(self, watch: Watch, steps: StepLimits, phase_limit: float) -> None:
        self._watch = watch
        self._steps = steps
        self._phase_limit = phase_limit
        self._since: float | None = None

    def enter(self, stage: Stage) -> None:
        self._watch.enter(stage.value, self._phase_limit)

    def renew(self) -> None:
        """Show a sign of life in the same stage."""
        self._watch.renew()

    def progress(self, progress: Progress, size: Size) -> None:
        """The engine has told that it gets on."""
        if progress.stage != Stage.STEPS:
            self.enter(progress.stage)
            return
        now = time.perf_counter()
        # The first word of the steps tells where they begin: not at 0 for a job that goes on where it was.
        if self._since is not None:
            self._steps.measured(size, now - self._since)
        self._since = now
        self._watch.enter(progress.stage.value, self._steps.of(size))


class Watchdog:
    """Watches while it is open, as a context manager, and ends the process when something watched hangs."""

    def __init__(self, stall_limit: float, phase_limit: float) -> None:
        self._stall_limit = stall_limit
        self._phase_limit = phase_limit
        self._tick = min(LONGEST_TICK, stall_limit / 4)
        self._steps = StepLimits(stall_limit, phase_limit)
        self._watches: dict[Watch, None] = {}
        self._ages: dict[Watch, tuple[Mark, float]] = {}
        self._before_end: Callable[[], None] | None = None
        self._came_round = math.inf
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def before_end(self, call: Callable[[], None]) -> None:
        """What to do first when something hangs, in the watchdog's thread; it must not wait."""
        self._before_end = call

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Allow the phase limit for what happens in the block."""
        with self._watch(what, Mark(what, self._phase_limit)):
            yield

    @contextmanager
    def job(self, job_id: str) -> Iterator[JobWatch]:
        """Watch an attempt, which begins by loading its input."""
        with self._watch(job_id, Mark(Stage.LOAD.value, self._phase_limit)) as watch:
            yield JobWatch(watch, self._steps, self._phase_limit)

    def watch_loop(self) -> None:
        """Watch the running event loop from now on, its end included: it must come round within the stall limit."""
        loop = get_running_loop()
        watch = Watch("event loop", Mark("running", self._stall_limit))
        self._watches[watch] = None

        def come_round() -> None:
            watch.renew()
            self._came_round = time.monotonic()
            loop.call_later(self._tick, come_round)

        come_round()

    @property
    def is_loop_stalled(self) -> bool:
        """Whether the watched event loop has not come round for the stall limit; from any thread."""
        return time.monotonic() - self._came_round > self._stall_limit

    def look(self, seconds: float) -> list[Hung]:
        """What hangs, ``seconds`` after the last look."""
        ages = {}
        for watch in tuple(self._watches):
            mark = watch.mark
            seen, age = self._ages.get(watch, (None, 0.0))
            ages[watch] = (mark, age + seconds if seen is mark else 0.0)
        self._ages = ages
        return [
            Hung(watch.what, mark.phase, round(age, 3), mark.limit)
            for watch, (mark, age) in ages.items()
            if age > mark.limit
        ]

    @contextmanager
    def _watch(self, what: str, mark: Mark) -> Iterator[Watch]:
        watch = Watch(what, mark)
        self._watches[watch] = None
        try:
            yield watch
        finally:
            del self._watches[watch]

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick):
            self._arm()
            now = time.monotonic()
            # Time in which this thread did not run either counts for little: the process was stopped or starved.
            if hung := self.look(min(now - last, 2 * self._tick)):
                self._end(hung)
            last = now

    def _arm(self) -> None:
        """Set the timer for native code that does not let go of the interpreter: that stops this thread, too.

        It needs no interpreter: it shows the stacks and ends the process, with exit status 1.
        """
        longest = max((watch.mark.limit for watch in tuple(self._watches)), default=self._phase_limit)
        faulthandler.dump_traceback_later(longest + 2 * self._tick, exit=True)

    def _end(self, hung: list[Hung]) -> NoReturn:
        try:
            if self._before_end is not None:
                self._before_end()
            # In a thread, because whoever hangs may hold a lock of the log's.
            words = threading.Thread(target=_last_words, args=(hung,), name="last words", daemon=True)
            words.start()
            words.join(LAST_WORDS_SECONDS)
        finally:
            os._exit(STALLED_STATUS)


def _last_words(hung: list[Hung]) -> None:
    log.error("watchdog_tripped", hung=[msgspec.structs.asdict(one) for one in hung])
    faulthandler.dump_traceback(all_threads=True)
    tracing.flush(LAST_WORDS_SECONDS)

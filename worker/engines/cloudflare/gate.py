"""How many calls a worker makes at once, and when it makes none: the upstream's answers decide.

The limit goes by additive increase and multiplicative decrease, as TCP's window does: it grows while calls come back
in time, by one a call until the first sign of overload and then by one a round of calls, and shrinks at that sign.
The breaker opens when call after call fails, and then lets one through from time to time. How many jobs a worker had
better have follows from both.
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from typing import Final, Self

FIRST_LIMIT: Final = 8
DECREASE: Final = 0.7
SLOW_FACTOR: Final = 3.0
"""A call that takes so many times as long as such calls take on average is slow."""
SLOW_CALLS: Final = 2
"""So many slow calls in a row are a sign of overload; a single one says as much about itself."""
SECONDS_WEIGHT: Final = 0.05
FIXED_WORK: Final = 5.0
"""Around its steps a call costs about as much as so many of them."""
FIRST_OPEN: Final = 5.0
LONGEST_OPEN: Final = 60.0
READY_JOBS: Final = 2
"""So many jobs more than calls keep all calls busy: one is being prepared while the result of another is stored."""


class Signal(Enum):
    """What a call's end says of the upstream."""

    DONE = auto()
    OVERLOADED = auto()
    FAILED = auto()
    ANSWERED = auto()
    """It works; of its load the call says nothing, because it was refused."""
    GIVEN_UP = auto()
    """The call was not made, or its caller left: that says nothing."""


class AdaptiveLimit:
    """The number of calls at once, between ``lowest`` and ``highest``."""

    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest = lowest
        self._highest = highest
        self._limit = float(min(max(lowest, FIRST_LIMIT), highest))
        self._mean: float | None = None
        self._slow = 0
        self._cut_at = -math.inf

    @property
    def calls(self) -> int:
        return int(self._limit)

    def done(self, began: float, now: float, work: float, running: int) -> None:
        """A call of so much ``work`` (steps of the native size) was done, one of ``running`` that were under way."""
        seconds = (now - began) / (FIXED_WORK + work)
        mean = self._mean
        self._mean = seconds if mean is None else mean + SECONDS_WEIGHT * (seconds - mean)
        is_slow = mean is not None and seconds > SLOW_FACTOR * mean
        self._slow = self._slow + 1 if is_slow else 0
        if self._slow >= SLOW_CALLS:
            self.overloaded(began, now)
        elif not is_slow and 2 * running > self._limit:  # what is not made use of tells nothing
            step = 1.0 if self._cut_at == -math.inf else 1 / self._limit
            self._limit = min(self._highest, self._limit + step)

    def overloaded(self, began: float, now: float) -> None:
        """Shrink, once for all calls that were under way together."""
        if began > self._cut_at:
            self._limit = max(self._lowest, self._limit * DECREASE)
            self._cut_at = now


class Breaker:
    """Open after ``failures`` calls in a row that failed; then one call at a time tries, later and later."""

    def __init__(self, failures: int, clock: Callable[[], float]) -> None:
        self._failures = failures
        self._clock = clock
        self._failed = 0
        self._open_for = FIRST_OPEN
        self._opens_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        return self._opens_at is not None

    def pause(self) -> float:
        """Seconds until a call may be made; infinite while another one tries."""
        if self._opens_at is None:
            return 0.0
        return math.inf if self._is_probing else max(0.0, self._opens_at - self._clock())

    def begin(self) -> bool:
        """A call is made; answers whether it is the one that tries."""
        self._is_probing = self._opens_at is not None
        return self._is_probing

    def ended(self, signal: Signal, *, probe: bool) -> None:
        if probe:
            self._is_probing = False
        if signal is Signal.FAILED:
            self._count_failure(probe)
        elif signal is not Signal.GIVEN_UP:
            self._failed, self._open_for, self._opens_at = 0, FIRST_OPEN, None

    def _count_failure(self, probe: bool) -> None:
        self._failed += 1
        if probe:
            self._open_for = min(2 * self._open_for, LONGEST_OPEN)
        if probe or (self._opens_at is None and self._failed >= self._failures):
            self._opens_at = self._clock() + self._open_for


class Gate:
    """Where calls wait for their turn, first come, first served by whoever calls ``Turn.take`` one at a time."""

    def __init__(self, lowest: int, highest: int, failures: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = AdaptiveLimit(lowest, highest)
        self.breaker = Breaker(failures, clock)
        self.running = 0
        self.clock = clock
        self._closed_until = -math.inf
        self._changed = asyncio.Event()

    def turn(self) -> "Turn":
        return Turn(self)

    def close(self, seconds: float) -> None:
        """Nobody can make a call for so long: more jobs than there are would only wait here."""
        self._closed_until = self.clock() + seconds
        self.ring()

    @property
    def slots(self) -> int:
        """How many jobs can be made use of now: none before a call may be made, one to try an upstream that failed."""
        if self._idle() > 0:
            return 0
        return 1 if self.breaker.is_open else self.limit.calls + READY_JOBS

    async def slots_changed(self, told: int) -> None:
        """Wait until ``slots`` may be another number than ``told``."""
        idle = self._idle()
        # The moment at which a call may be made can pass between the caller's look and this one: nobody would ring.
        if (told == 0) == (idle > 0):
            await self.change(idle or math.inf)

    def ring(self) -> None:
        """Tell all who wait that something has changed."""
        self._changed.set()

    async def change(self, seconds: float) -> None:
        """Wait until something has changed, at most so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds if seconds < math.inf else None):
                await self._changed.wait()

    def _idle(self) -> float:
        """Seconds until a call may be made; 0 while one tries: whoever made it may have to try again."""
        pause = self.breaker.pause()
        return max(0.0, self._closed_until - self.clock(), pause if pause < math.inf else 0.0)


class Turn:
    """One call's turn: taken in the block, given back at its end. Say there how the call went, with ``ended``."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._began: float | None = None
        self._ended = 0.0
        self._is_probe = False
        self._signal = Signal.GIVEN_UP
        self._work = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        gate = self._gate
        if self._began is None:
            return
        if self._signal is Signal.DONE:
            gate.limit.done(self._began, self._ended, self._work, gate.running)
        elif self._signal is Signal.OVERLOADED:
            gate.limit.overloaded(self._began, self._ended)
        gate.breaker.ended(self._signal, probe=self._is_probe)
        gate.running -= 1
        gate.ring()

    async def take(self) -> None:
        """Wait until one more call may be made."""
        gate = self._gate
        while (pause := gate.breaker.pause()) > 0 or gate.running >= gate.limit.calls:
            await gate.change(pause or math.inf)
        self._is_probe = gate.breaker.begin()
        gate.running += 1
        self._began = gate.clock()

    def begin(self) -> None:
        """The call is made now: its time counts from here."""
        self._began = self._gate.clock()

    def ended(self, signal: Signal, work: float = 0.0) -> None:
        """How the call went that ends now; ``work`` is in steps of a picture of the native size.

        What follows it, such as its place in the books, takes time that says nothing of the upstream.
        """
        self._ended = self._gate.clock()
        self._signal, self._work = signal, work

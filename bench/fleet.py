"""A simulated fleet under an autoscaler: the work behind ``python bench/autoscale.py``.

Time is simulated, event by event: nothing here waits. A worker takes ``START`` seconds from the decision to its first
job and runs ``slots`` jobs at once, each for its own time, as an engine does whose passes take many jobs. One that is
to go takes no more jobs and ends with its last one. Paid for is all of that.

The autoscaler is KEDA with the Horizontal Pod Autoscaler that it makes. KEDA brings the first worker (as soon as it is
told, or at its next poll) and takes the last one away after its cooldown. Between those the HPA looks every 15 s,
leaves things as they are within its tolerance, scales up at once, and down by one worker a minute to the most that
was wanted in the last five minutes.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

START: Final = 90.0
MOST: Final = 30
SYNC: Final = 15.0
TOLERANCE: Final = 0.1
STABLE: Final = 300.0
DOWN_EVERY: Final = 60.0
POLL: Final = 30.0
PUSH: Final = 1.0
COOLDOWN: Final = 300.0
SAMPLE: Final = 60.0
ERROR: Final = 0.2
"""Standard deviation of the logarithm of estimated over actual seconds of a job."""


class Load(msgspec.Struct, frozen=True):
    """``arrivals`` are times and seconds of jobs, both of simulated time."""

    length: float
    arrivals: Sequence[tuple[float, float]]

    @property
    def seconds(self) -> float:
        """Of all jobs together."""
        return sum(seconds for _, seconds in self.arrivals)

    @property
    def mean_seconds(self) -> float:
        return self.seconds / len(self.arrivals)

    def offered(self, window: float, slots: int) -> list[tuple[float, float]]:
        """How many workers of ``slots`` each the work that comes in within a window would keep busy, at its start."""
        sums = [0.0] * math.ceil(self.length / window)
        for at, seconds in self.arrivals:
            sums[int(at / window)] += seconds
        return [(number * window, total / window / slots) for number, total in enumerate(sums)]


class Rule(msgspec.Struct, frozen=True):
    """What the autoscaler goes by: how many workers it ``wants`` of a fleet, ``least`` at any time.

    ``pushed``: KEDA is told when there is work for a first worker, instead of asking every ``POLL`` seconds.
    """

    name: str
    wants: "Callable[[Fleet], int]"
    least: int = 0
    pushed: bool = False


class Sample(msgspec.Struct, frozen=True):
    """The fleet at a moment: workers that are paid for, seconds that the next job has waited."""

    at: float
    workers: int
    waiting: float


class Outcome(msgspec.Struct, frozen=True):
    """What a rule made of a load."""

    waits: list[float]
    gpu_hours: float
    actions: int
    samples: list[Sample]


class Worker:
    """``busy`` adds up the seconds with at least one job; ``looks`` are what that was at the latest syncs."""

    def __init__(self, born: float) -> None:
        self.born = born
        self.running = 0
        self.is_ready = False
        self.is_leaving = False
        self.busy = 0.0
        self.busy_since = 0.0
        self.looks: deque[tuple[float, float]] = deque(maxlen=3)

    def busy_seconds(self, now: float) -> float:
        return self.busy + (now - self.busy_since if self.running else 0.0)

    def utilisation(self, now: float) -> float:
        """The share of the last two syncs' time with at least one job: what a GPU's utilisation says."""
        if not self.looks or self.looks[0][0] == now:
            return 1.0 if self.running else 0.0
        at, busy = self.looks[0]
        return (self.busy_seconds(now) - busy) / (now - at)


class Fleet:
    """One run of a load under a rule."""

    def __init__(self, load: Load, rule: Rule, slots: int, seed: int) -> None:
        self.now = 0.0
        self.waiting: deque[tuple[float, float, float]] = deque()
        self.workers: list[Worker] = []
        self.wanted = 0
        self.slots = slots
        self._load, self._rule = load, rule
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._waiting_estimate = self._running_estimate = self._running_since = 0.0
        self._recommended: deque[tuple[float, int]] = deque()
        self._last_active, self._last_down = -math.inf, -math.inf
        self._gpu_seconds = 0.0
        self._outcome = Outcome([], 0.0, 0, [])
        self._actions = 0

    def run(self) -> Outcome:
        """Until the load has ended and every job is done."""
        arrivals = iter(self._load.arrivals)
        self._arrive_next(arrivals)
        self._scale_to(self._rule.least)
        for every, act in ((SYNC, self._sync), (PUSH if self._rule.pushed else POLL, self._poll), (SAMPLE, self._look)):
            self._repeat(every, act)
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self._gpu_seconds += sum(self.now - worker.born for worker in self.workers)
        return msgspec.structs.replace(self._outcome, gpu_hours=self._gpu_seconds / 3600, actions=self._actions)

    # What rules may look at.

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self.workers)

    @property
    def taking(self) -> int:
        """Workers that take jobs."""
        return sum(worker.is_ready and not worker.is_leaving for worker in self.workers)

    @property
    def backlog(self) -> float:
        """Estimated seconds of what waits, and of what is left of what runs, as the queue's script reckons them."""
        elapsed = self.running * self.now - self._running_since
        return self._waiting_estimate + max(0.0, self._running_estimate - elapsed)

    def utilisations(self) -> tuple[list[float], int]:
        """Of each worker that takes jobs, and how many are on their way."""
        ready = [w.utilisation(self.now) for w in self.workers if w.is_ready and not w.is_leaving]
        return ready, sum(not worker.is_ready for worker in self.workers)

    # Jobs

    def _arrive_next(self, arrivals: Iterator[tuple[float, float]]) -> None:
        following = next(arrivals, None)
        if following is None:
            return
        at, seconds = following

        def arrive() -> None:
            estimate = seconds * self._random.lognormvariate(0.0, ERROR)
            self.waiting.append((at, seconds, estimate))
            self._waiting_estimate += estimate
            self._start_jobs()
            self._arrive_next(arrivals)

        self._at(at, arrive)

    def _start_jobs(self) -> None:
        while self.waiting:
            free = [w for w in self.workers if w.is_ready and not w.is_leaving and w.running < self.slots]
            if not free:
                return
            arrived, seconds, estimate = self.waiting.popleft()
            self._waiting_estimate = self._waiting_estimate - estimate if self.waiting else 0.0
            self._outcome.waits.append(self.now - arrived)
            self._start(self._random.choice(free), seconds, estimate)

    def _start(self, worker: Worker, seconds: float, estimate: float) -> None:
        started = self.now
        if worker.running == 0:
            worker.busy_since = started
        worker.running += 1
        self._running_estimate += estimate
        self._running_since += started

        def end() -> None:
            worker.running -= 1
            self._running_estimate -= estimate
            self._running_since -= started
            if worker.running == 0:
                worker.busy += self.now - worker.busy_since
                if worker.is_leaving:
                    self._remove(worker)
            self._start_jobs()

        self._at(started + seconds, end)

    # Workers

    def _scale_to(self, wanted: int) -> None:
        if wanted == self.wanted:
            return
        self._actions += 1
        self.wanted = wanted
        staying = [worker for worker in self.workers if not worker.is_leaving]
        for _ in range(wanted - len(staying)):
            self._add()
        # Kubernetes takes those that are not ready first, then the youngest.
        staying.sort(key=lambda worker: (worker.is_ready, -worker.born))
        for worker in staying[: max(0, len(staying) - wanted)]:
            worker.is_leaving = True
            if worker.running == 0:
                self._remove(worker)

    def _add(self) -> None:
        worker = Worker(self.now)
        self.workers.append(worker)

        def be_ready() -> None:
            worker.is_ready = True
            self._start_jobs()

        self._at(self.now + START, be_ready)

    def _remove(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self._gpu_seconds += self.now - worker.born

    # The autoscaler

    def _poll(self) -> None:
        """KEDA's part: the first worker and the last one."""
        if self.waiting or self.running:
            self._last_active = self.now
            if self.wanted == 0:
                self._recommended.clear()
                self._scale_to(1)
        elif self.wanted == 1 and self._rule.least == 0 and self.now - self._last_active >= COOLDOWN:
            self._scale_to(0)

    def _sync(self) -> None:
        """The HPA's part."""
        for worker in self.workers:
            worker.looks.append((self.now, worker.busy_seconds(self.now)))
        if self.wanted == 0:
            return
        wanted = min(MOST, max(1, self._rule.least, self._rule.wants(self)))
        self._recommended.append((self.now, wanted))
        while self._recommended[0][0] < self.now - STABLE:
            self._recommended.popleft()
        if wanted > self.wanted:
            self._scale_to(wanted)
            return
        held = max(number for _, number in self._recommended)
        if held < self.wanted and self.now - self._last_down >= DOWN_EVERY:
            self._last_down = self.now
            self._scale_to(self.wanted - 1)

    def _look(self) -> None:
        waited = self.now - self.waiting[0][0] if self.waiting else 0.0
        self._outcome.samples.append(Sample(self.now, len(self.workers), waited))

    # Time

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, act))

    def _repeat(self, every: float, act: Callable[[], None]) -> None:
        def again() -> None:
            act()
            if self.now < self._load.length or self.waiting or self.running:
                self._at(self.now + every, again)

        self._at(self.now + every, again)


def by_average(metric: float, target: float, current: int) -> int:
    """The HPA's rule for an ``AverageValue`` of ``target``, at ``current`` workers."""
    if current and abs(metric / (target * current) - 1) <= TOLERANCE:
        return current
    return math.ceil(metric / target)


def by_utilisation(ready: Sequence[float], starting: int, target: float, current: int) -> int:
    """Its rule for a metric of pods, of which those that start count as idle when there would be more of them."""
    if not ready:
        return current
    ratio = sum(ready) / len(ready) / target
    if abs(ratio - 1) <= TOLERANCE:
        return current
    if ratio > 1 and starting:
        cautious = sum(ready) / (len(ready) + starting) / target
        return math.ceil(cautious * (len(ready) + starting)) if cautious > 1 + TOLERANCE else current
    return math.ceil(ratio * len(ready))

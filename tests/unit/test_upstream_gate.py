"""How many calls go upstream at once, and when none do; by a clock of the test's own."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from worker.engines.cloudflare.gate import FIRST_LIMIT, READY_JOBS, AdaptiveLimit, Breaker, Gate, Signal, Turn


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestLimit:
    def test_it_grows_by_one_a_call_until_the_first_overload(self) -> None:
        limit = AdaptiveLimit(1, 64)
        for call in range(20):
            assert limit.calls == FIRST_LIMIT + call
            limit.done(call, call + 1, work=5, running=limit.calls)

    def test_then_by_one_a_round(self) -> None:
        limit = AdaptiveLimit(1, 64)
        limit.overloaded(began=0, now=1)
        calls = limit.calls
        for _ in range(calls + 1):
            limit.done(2, 3, work=5, running=calls)
        assert limit.calls == calls + 1

    def test_calls_that_were_under_way_together_shrink_it_once(self) -> None:
        limit = AdaptiveLimit(1, 64)
        for _ in range(8):
            limit.overloaded(began=0, now=1)
        assert limit.calls == 5
        limit.overloaded(began=2, now=3)
        assert limit.calls == 3

    def test_it_stays_within_its_bounds(self) -> None:
        limit = AdaptiveLimit(2, 10)
        for call in range(100):
            limit.done(call, call + 1, work=5, running=10)
        assert limit.calls == 10
        for call in range(100, 150):
            limit.overloaded(call, call + 0.5)
        assert limit.calls == 2

    def test_a_limit_below_the_first_one_is_where_it_begins(self) -> None:
        assert AdaptiveLimit(1, 3).calls == 3
        assert AdaptiveLimit(20, 64).calls == 20

    def test_what_is_not_made_use_of_does_not_grow(self) -> None:
        limit = AdaptiveLimit(1, 64)
        for call in range(20):
            limit.done(call, call + 1, work=5, running=1)
        assert limit.calls == FIRST_LIMIT

    def test_two_calls_in_a_row_that_take_much_longer_than_usual_are_an_overload(self) -> None:
        """For their work: twenty steps may take longer than one."""
        limit = AdaptiveLimit(1, 64)
        limit.done(0, 1, work=0, running=1)
        for began in (10, 20):
            limit.done(began, began + 5, work=20, running=1)
        assert limit.calls == FIRST_LIMIT
        for began in (30, 40):
            limit.done(began, began + 4, work=0, running=1)
        assert limit.calls < FIRST_LIMIT

    def test_a_single_slow_call_neither_shrinks_nor_grows_it(self) -> None:
        """However often that happens, as long as calls in time come in between."""
        limit = AdaptiveLimit(1, 64)
        limit.done(0, 0.1, work=0, running=1)
        for began in range(1, 10):
            limit.done(began, began + 0.5, work=0, running=limit.calls)
            assert limit.calls == FIRST_LIMIT
            for _ in range(9):
                limit.done(began, began + 0.1, work=0, running=1)


class TestBreaker:
    def test_it_opens_after_so_many_failures_in_a_row(self, clock: Clock) -> None:
        breaker = Breaker(3, clock)
        for signal in (Signal.FAILED, Signal.FAILED, Signal.ANSWERED, Signal.FAILED, Signal.FAILED):
            breaker.ended(signal, probe=False)
        assert not breaker.is_open
        breaker.ended(Signal.FAILED, probe=False)
        assert breaker.is_open
        assert breaker.pause() == 5.0

    def test_then_one_call_tries_at_a_time_later_and_later(self, clock: Clock) -> None:
        breaker = Breaker(1, clock)
        breaker.ended(Signal.FAILED, probe=False)
        for seconds in (5, 10, 20, 40, 60, 60):
            assert breaker.pause() == seconds
            clock.now += seconds
            assert breaker.pause() == 0
            assert breaker.begin()
            assert breaker.pause() == float("inf")
            breaker.ended(Signal.FAILED, probe=True)

    @pytest.mark.parametrize("signal", [Signal.DONE, Signal.OVERLOADED, Signal.ANSWERED])
    def test_any_answer_closes_it(self, clock: Clock, signal: Signal) -> None:
        breaker = Breaker(1, clock)
        breaker.ended(Signal.FAILED, probe=False)
        clock.now = 5.0
        breaker.ended(signal, probe=breaker.begin())
        assert not breaker.is_open
        assert not breaker.begin()

    def test_a_try_that_was_given_up_leaves_it_to_the_next(self, clock: Clock) -> None:
        breaker = Breaker(1, clock)
        breaker.ended(Signal.FAILED, probe=False)
        clock.now = 5.0
        breaker.ended(Signal.GIVEN_UP, probe=breaker.begin())
        assert breaker.is_open
        assert breaker.pause() == 0

    def test_calls_that_were_under_way_when_it_opened_do_not_keep_it_open_for_longer(self, clock: Clock) -> None:
        breaker = Breaker(2, clock)
        for _ in range(2):
            breaker.ended(Signal.FAILED, probe=False)
        clock.now = 4.0
        breaker.ended(Signal.FAILED, probe=False)
        assert breaker.pause() == 1.0


@contextmanager
def taken(turn: Turn) -> Iterator[asyncio.Task[None]]:
    """The turn, asked for in a task that has come as far as it can."""
    with turn:
        task = asyncio.create_task(turn.take())
        yield task
        task.cancel()


async def come_round() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class TestTurns:
    async def test_as_many_are_taken_as_the_limit_says(self) -> None:
        gate = Gate(1, 2, 5)
        with ExitStack() as turns, taken(gate.turn()) as waiting:
            for _ in range(2):
                await turns.enter_context(gate.turn()).take()
            await come_round()
            assert not waiting.done()
            turns.close()
            await waiting
            assert gate.running == 1
        assert gate.running == 0

    async def test_one_that_was_not_taken_gives_nothing_back(self) -> None:
        gate = Gate(1, 2, 5)
        with gate.turn():
            pass
        assert gate.running == 0

    async def test_an_open_breaker_lets_one_try(self, clock: Clock) -> None:
        """Its answer lets the others go."""
        gate = Gate(1, 8, 1, clock)
        with gate.turn() as turn:
            await turn.take()
            turn.ended(Signal.FAILED)
        clock.now = 5.0
        with ExitStack() as stack:
            first = stack.enter_context(gate.turn())
            await first.take()
            with taken(gate.turn()) as second:
                await come_round()
                assert not second.done()
                first.ended(Signal.DONE)
                stack.close()
                await second

    async def test_what_comes_after_a_call_does_not_make_it_a_slow_one(self, clock: Clock) -> None:
        """A queue server that is slow to note it is no overload of the upstream."""
        gate = Gate(1, 8, 5, clock)
        for _ in range(4):
            with gate.turn() as turn:
                await turn.take()
                clock.now += 1.0
                turn.ended(Signal.DONE)
                clock.now += 60.0 if gate.clock() > 2.0 else 0.0
        assert gate.limit.calls == FIRST_LIMIT


class TestSlots:
    """How many jobs a worker had better have."""

    def test_as_many_as_calls_and_a_few_that_are_ready(self) -> None:
        gate = Gate(1, 64, 5)
        assert gate.slots == FIRST_LIMIT + READY_JOBS
        gate.limit.overloaded(began=0, now=1)
        assert gate.slots == gate.limit.calls + READY_JOBS < FIRST_LIMIT

    async def test_none_while_the_breaker_is_open_and_one_to_try(self, clock: Clock) -> None:
        """Still one while it tries, and all when its answer has come."""
        gate = Gate(1, 8, 1, clock)
        with gate.turn() as turn:
            await turn.take()
            turn.ended(Signal.FAILED)
        assert gate.slots == 0
        clock.now = 5.0
        assert gate.slots == 1
        with gate.turn() as turn:
            await turn.take()
            assert gate.slots == 1
            turn.ended(Signal.DONE)
        assert gate.slots == FIRST_LIMIT + READY_JOBS

    async def test_none_again_when_the_one_that_tried_has_failed(self, clock: Clock) -> None:
        gate = Gate(1, 8, 1, clock)
        for now in (0.0, 5.0):
            clock.now = now
            with gate.turn() as turn:
                await turn.take()
                turn.ended(Signal.FAILED)
            assert gate.slots == 0

    def test_none_for_as_long_as_nobody_can_call(self, clock: Clock) -> None:
        gate = Gate(1, 8, 1, clock)
        gate.close(60.0)
        clock.now = 59.0
        assert gate.slots == 0
        clock.now = 60.0
        assert gate.slots == FIRST_LIMIT + READY_JOBS

    async def test_whoever_asks_hears_of_a_change(self) -> None:
        """Of the end of a call, of a gate that closes, and of one that opens by itself."""
        gate = Gate(1, 8, 5)
        with gate.turn() as turn:
            await turn.take()
            for change in (lambda: turn.__exit__(), lambda: gate.close(0.01)):
                listening = asyncio.create_task(gate.slots_changed(gate.slots))
                await come_round()
                assert not listening.done()
                change()
                await listening
        while (told := gate.slots) == 0:
            await gate.slots_changed(told)

    async def test_a_change_between_the_look_and_the_wait_is_heard_of(self, clock: Clock) -> None:
        """Time alone may bring it, and then no call ends that would tell."""
        gate = Gate(1, 8, 1, clock)
        gate.close(60.0)
        told = gate.slots
        clock.now = 60.0
        listening = asyncio.create_task(gate.slots_changed(told))
        await come_round()
        assert listening.done()

"""What is sent beside the work: one at a time, the newest, and not too often."""

import asyncio
from typing import Any

import pytest

from worker.reports import Outbox, Throttle


class Line:
    """Where an outbox sends to: takes one thing each time it is let through."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.done: list[Any] = []
        self.gate = asyncio.Semaphore(0)

    async def send(self, item: Any) -> None:
        self.begun.append(item)
        await self.gate.acquire()
        self.done.append(item)


@pytest.fixture
async def line() -> Line:
    return Line()


@pytest.fixture
async def outbox(line: Line) -> Outbox[int]:
    return Outbox("test", line.send)


async def test_offering_never_waits_and_sends_the_newest(line: Line, outbox: Outbox[int]) -> None:
    """What was offered in between is left out."""
    outbox.offer(1)
    await asyncio.sleep(0)
    for item in (2, 3, 4):
        outbox.offer(item)
    assert (outbox.is_busy, line.begun) == (True, [1])
    for _ in range(2):
        line.gate.release()
    await outbox.drain()
    assert (outbox.is_busy, line.done) == (False, [1, 4])


async def test_a_closed_outbox_ends_what_is_under_way(line: Line, outbox: Outbox[int]) -> None:
    """What waits is not sent."""
    outbox.offer(1)
    await asyncio.sleep(0)
    outbox.offer(2)
    line.gate.release()
    await outbox.close(give_up=False)
    assert (line.begun, line.done) == ([1], [1])


async def test_who_cannot_wait_gives_up_what_is_under_way(line: Line, outbox: Outbox[int]) -> None:
    outbox.offer(1)
    await asyncio.sleep(0)
    await outbox.close(give_up=True)
    assert (outbox.is_busy, line.begun, line.done) == (False, [1], [])


async def test_a_wait_for_the_end_that_is_cancelled_leaves_nothing_running(line: Line, outbox: Outbox[int]) -> None:
    outbox.offer(1)
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.close(give_up=False), 0.01)
    await outbox.drain()
    assert (outbox.is_busy, line.done) == (False, [])


async def test_closing_an_unused_outbox_is_fine(outbox: Outbox[int]) -> None:
    await outbox.close(give_up=True)
    await outbox.drain()


@pytest.mark.parametrize(("interval", "allowed"), [(0.0, [True, True]), (1000.0, [True, False])])
def test_a_throttle_lets_the_first_through(interval: float, allowed: list[bool]) -> None:
    throttle = Throttle(interval)
    assert [throttle.allows(), throttle.allows()] == allowed

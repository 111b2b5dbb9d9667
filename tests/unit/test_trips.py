"""Calls that share trips: what comes together goes together, and nobody waits for ever."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from img2img import trips as module
from img2img.errors import Unavailable
from img2img.trips import SharedTrips


class Server:
    """Doubles numbers, and keeps what each trip carried; the first trip waits for ``open``."""

    def __init__(self) -> None:
        self.trips: list[list[Any]] = []
        self.begun = asyncio.Event()
        self.open = asyncio.Event()

    async def send(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        self.trips.append([number for (number,) in calls])
        self.begun.set()
        await self.open.wait()
        return [Unavailable("no") if number < 0 else 10 // number * 2 for (number,) in calls]


async def test_what_comes_during_a_trip_shares_the_next() -> None:
    server = Server()
    trips = SharedTrips(server.send)
    calls = [asyncio.create_task(trips.call(number)) for number in (1, 2, 5)]
    await asyncio.sleep(0)
    late = asyncio.create_task(trips.call(10))
    await asyncio.sleep(0)
    server.open.set()
    assert await asyncio.gather(*calls, late) == [20, 10, 4, 2]
    assert server.trips == [[1, 2, 5], [10]]


async def test_a_call_that_failed_fails_alone() -> None:
    server = Server()
    server.open.set()
    trips = SharedTrips(server.send)
    answers = await asyncio.gather(*(trips.call(number) for number in (1, -1, 2)), return_exceptions=True)
    assert [answers[0], type(answers[1]), answers[2]] == [20, Unavailable, 10]


async def test_nobody_waits_for_a_trip_that_broke_down() -> None:
    """A defect in sending is everybody's error, and the next trip is made all the same."""
    server = Server()
    server.open.set()
    trips = SharedTrips(server.send)
    answers = await asyncio.gather(trips.call(1), trips.call(0), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError]
    assert await trips.call(1) == 20


async def test_a_caller_that_has_gone_holds_nobody_up() -> None:
    server = Server()
    trips = SharedTrips(server.send)
    gone, stays = asyncio.create_task(trips.call(1)), asyncio.create_task(trips.call(2))
    await asyncio.sleep(0)
    gone.cancel()
    server.open.set()
    assert await stays == 10
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_a_call_whose_trip_did_not_begin_goes_with_its_caller() -> None:
    """Nobody would be told of what it did, not even who undoes what may have been done."""
    server = Server()
    trips = SharedTrips(server.send)
    stays = asyncio.create_task(trips.call(1))
    await server.begun.wait()
    gone = asyncio.create_task(trips.call(2))
    await asyncio.sleep(0)
    gone.cancel()
    server.open.set()
    assert await asyncio.gather(stays, trips.call(5)) == [20, 4]
    assert server.trips == [[1], [5]]
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_nobody_waits_longer_than_a_call_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a trip that does not end, calls end all the same, and what they wanted is not done long after."""
    monkeypatch.setattr(module, "CALL_SECONDS", 0.05)
    server = Server()
    trips = SharedTrips(server.send)
    first = asyncio.create_task(trips.call(1))
    await server.begun.wait()
    answers = await asyncio.gather(first, *(trips.call(2) for _ in range(2 * module.MOST)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    monkeypatch.undo()
    server.open.set()
    assert await trips.call(5) == 4
    assert server.trips == [[1], [5]]

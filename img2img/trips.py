"""Calls of one script that go to the server together: those that come while one trip is under way share the next.

A call that comes alone goes at once; none waits for others to join it, nor for longer than any call may take.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from img2img.errors import Unavailable
from img2img.server import CALL_SECONDS, translated

Arguments = Sequence[Any]
MOST: Final = 64


class SharedTrips:
    """``send`` carries several sets of arguments and answers in their order, an ``Unavailable`` for one that failed."""

    def __init__(self, send: Callable[[Sequence[Arguments]], Awaitable[list[Any]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Arguments, asyncio.Future[Any]]] = []
        self._under_way: asyncio.Task[None] | None = None

    async def call(self, *arguments: Any) -> Any:
        """The script's answer. A caller that is cancelled takes its call back, unless that is under way already.

        Raises:
            Unavailable: the server cannot be reached within ``CALL_SECONDS``, the wait for the trip before included,
                or did not carry it out; it may have, if the trip failed.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((arguments, answer))
        if self._under_way is None:
            self._under_way = asyncio.create_task(self._travel(), name="shared-trips")
        with translated():
            async with asyncio.timeout(CALL_SECONDS):
                answered = await answer
        if isinstance(answered, Exception):
            raise answered
        return answered

    async def _travel(self) -> None:
        try:
            while self._waiting:
                # Nobody is told any more of what those want who have gone meanwhile.
                wanted = [call for call in self._waiting if not call[1].done()]
                batch, self._waiting = wanted[:MOST], wanted[MOST:]
                answers = await self._answers([arguments for arguments, _ in batch]) if batch else []
                for (_, answer), answered in zip(batch, answers, strict=True):
                    if not answer.done():
                        answer.set_result(answered)
        finally:
            self._under_way = None

    async def _answers(self, calls: list[Arguments]) -> list[Any]:
        try:
            return await self._send(calls)
        except Unavailable as exc:
            return [Unavailable(str(exc)) for _ in calls]
        except Exception as exc:  # a defect of ours: whoever waits must hear of it, not wait for ever
            return [exc for _ in calls]

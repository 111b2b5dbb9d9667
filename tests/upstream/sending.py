"""When an answer is sent, and in which pieces; the same over both versions of HTTP."""

import asyncio
import math
from collections.abc import Iterator
from typing import Final

from tests.upstream.answers import Answer
from tests.upstream.api import Api

PIECES: Final = 20


async def turn(api: Api, answer: Answer) -> None:
    """Wait until the answer's first byte is due."""
    if answer.hold:
        await api.released.wait()
    await pause(answer.delay)


def pieces(answer: Answer) -> Iterator[tuple[bytes, float]]:
    """The body's parts, each with the time to wait after it (seconds)."""
    body = answer.body[: answer.sent]
    size = max(1, math.ceil(len(body) / PIECES)) if answer.pace else max(1, len(body))
    for _ in range(answer.repeat):
        for start in range(0, len(body), size):
            yield body[start : start + size], answer.pace / PIECES


async def pause(seconds: float) -> None:
    if math.isinf(seconds):
        await asyncio.Event().wait()
    if seconds:
        await asyncio.sleep(seconds)

"""Waiting for something on behalf of a client, but no longer than for the client itself."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from gateway.rest.context import AnyRequest
from img2img.errors import ClientClosed

T = TypeVar("T")


async def unless_gone(request: AnyRequest, waiting: Coroutine[Any, Any, T]) -> T:
    """What ``waiting`` comes to; it is cancelled when the client goes away. The body must have been read.

    Raises:
        ClientClosed: the client went away first.
    """
    work = asyncio.create_task(waiting, name="waiting")
    gone = asyncio.create_task(_disconnected(request), name="disconnect")
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientClosed("The client went away before its answer was there")
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: AnyRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""A TCP proxy for tests: a network that falls silent, is slow, or leads to another server."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

T = TypeVar("T")
CHUNK = 64 * 1024


class Proxy:
    """Forwards a port of its own to the port ``target``; runs in a thread with its own loop."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.bytes_per_second: float | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._passable = asyncio.Event()
        self._passable.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @contextmanager
    def black_hole(self) -> Iterator[None]:
        """Nothing passes and nothing is closed, on old connections and on new ones; afterwards all of it passes."""
        self._call(self._block())
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._passable.set)

    def cut(self) -> None:
        """Close every connection."""
        self._call(self._cut())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._cut()

    async def _block(self) -> None:
        self._passable.clear()

    async def _cut(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            await self._passable.wait()
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(to_writer)
            ways = {
                asyncio.create_task(self._forward(reader, to_writer)),
                asyncio.create_task(self._forward(to_reader, writer)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # whoever ends it, both sides see it closed
        finally:
            self._tasks.discard(task)
            for each in writers:
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self.bytes_per_second is not None:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            await self._passable.wait()
            writer.write(data)
            await writer.drain()
        await self._passable.wait()

"""The engine: one thread owns the model, the event loop only receives what it reports."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import TracebackType
from typing import Final, Self

from img2img.errors import EngineFailed
from worker.engines.base import Checkpoint, EngineInfo, Output, Pictures, Task
from worker.engines.diffusion.model import DiffusionModel, open_model
from worker.engines.diffusion.painting import paint

NAME: Final = "diffusion"


class DiffusionEngine:
    """Makes pictures with the checkpoint ``model`` on ``device`` (auto, cpu, cuda, cuda:N).

    ``model`` is the bundled ``emoji-sd``, a diffusers folder, a ``.safetensors`` file or a hub id. Tasks run
    one after the other in one thread, however many are asked for at once.

    Entering it raises ``ConfigurationError`` when the checkpoint or the device cannot be used.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        self._source = model
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._model: DiffusionModel | None = None
        self._closing = threading.Event()

    @property
    def info(self) -> EngineInfo:
        model, _ = self._opened()
        return EngineInfo(NAME, model.name, str(model.device), model.native_size)

    async def __aenter__(self) -> Self:
        thread = ThreadPoolExecutor(1, thread_name_prefix=NAME)
        try:
            loop = asyncio.get_running_loop()
            self._model = await loop.run_in_executor(thread, open_model, self._source, self._device)
        except BaseException:
            thread.shutdown(wait=False, cancel_futures=True)
            raise
        self._thread = thread
        self._closing.clear()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, self._thread, self._model = self._thread, None, None
        self._closing.set()
        if thread is not None:
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        """Make one picture; see ``Engine.generate``. Closing it waits for the step in progress to end."""
        model, thread = self._opened()
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output | None] = asyncio.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                with closing(paint(model, task, pictures)) as painting:
                    for output in painting:
                        if stop.is_set():
                            return
                        if self._closing.is_set():
                            raise EngineFailed("The worker closed its engine before the picture was done")
                        loop.call_soon_threadsafe(outputs.put_nowait, output)
            finally:
                loop.call_soon_threadsafe(outputs.put_nowait, None)

        submitted = thread.submit(work)
        running = asyncio.wrap_future(submitted)
        try:
            while (output := await outputs.get()) is not None:
                yield output
            await asyncio.wait([running])
            running.result()
        finally:
            stop.set()
            submitted.cancel()
            await _settle(running)

    def _opened(self) -> tuple[DiffusionModel, ThreadPoolExecutor]:
        if self._model is None or self._thread is None:
            raise RuntimeError("The engine is not open: use it inside 'async with'")
        return self._model, self._thread


async def _settle(running: asyncio.Future[None]) -> None:
    """Wait until the thread has let go of a task, even if the waiting is itself cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if not running.cancelled():
        running.exception()  # marks it as seen: whoever closes early does not want it
    if cancelled is not None:
        raise cancelled

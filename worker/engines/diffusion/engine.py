"""The engine: each device has a lane with a thread of its own, the event loop only receives what they report."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import msgspec
import structlog
import torch

from img2img.errors import ConfigurationError
from worker.engines.base import Checkpoint, EngineInfo, Output, Pictures, Task
from worker.engines.diffusion.batcher import GUIDED_ROWS, Limits
from worker.engines.diffusion.lane import Intervals, Lane, Order
from worker.engines.diffusion.model import DiffusionModel, open_model, resolve_devices
from worker.engines.diffusion.previews import PreviewMap
from worker.engines.diffusion.warmup import places_agree, warm_up

NAME: Final = "diffusion"
log = structlog.get_logger(__name__)
CUDA_ROWS, CUDA_FIXED_ROWS = 32, 8
CPU_ROWS, CPU_FIXED_ROWS = 8, 2
"""On a CPU a pass of a small network takes less time than its rows one by one: with the bundled model 26 ms of a core a
row of eight, 33 of two, 45 of one. Rows that only fill up a reproducible pass cost as much as any."""
LARGE_CPU_ROWS: Final = 4
"""A large network fills a CPU with few rows, and more would only make each other wait."""


class EngineOptions(msgspec.Struct, frozen=True):
    """How the engine works: rows of a pass at the model's own size, and rows of every pass of reproducible tasks (0:
    what suits the device), number format of the networks (auto, float32, bfloat16, float16), whether torch compiles
    the UNet, and seconds between outputs.
    """

    max_rows: int = 0
    reproducible_rows: int = 0
    precision: str = "auto"
    compiled: bool = False
    intervals: Intervals = Intervals()


class DiffusionEngine:
    """Makes pictures with the checkpoint ``model`` on ``device`` (auto, cpu, cuda, cuda:N, or several with commas).

    ``model`` is the bundled ``emoji-sd``, a diffusers folder, a ``.safetensors`` file or a hub id. Tasks on one device
    share the passes through its network; a new one goes to the device that has the fewest.

    Entering it raises ``ConfigurationError`` when the checkpoint or a device cannot be used, or has not the memory.
    """

    def __init__(self, model: str, device: str = "auto", options: EngineOptions | None = None) -> None:
        self._source = model
        self._device = device
        self._options = options or EngineOptions()
        self._lanes: list[Lane] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._running: list[asyncio.Future[None]] = []

    @property
    def info(self) -> EngineInfo:
        models = [lane.model for lane in self._opened()]
        device = ", ".join(str(model.device) for model in models)
        return EngineInfo(NAME, models[0].name, device, models[0].native_size)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        devices = resolve_devices(self._device)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"{NAME}-{device}") for device in devices]
        try:
            for thread, device in zip(self._threads, devices, strict=True):
                lane = await loop.run_in_executor(thread, self._open_lane, device)
                self._lanes.append(lane)
                self._running.append(loop.run_in_executor(thread, lane.run))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fail what still runs, and wait for the threads: each ends after the step in progress."""
        lanes, threads, running = self._lanes, self._threads, self._running
        self._lanes, self._threads, self._running = [], [], []
        for lane in lanes:
            lane.close()
        await asyncio.gather(*running, return_exceptions=True)
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def slots(self, setting: int) -> int:
        """As many guided tasks as fit into a pass of each device, unless the operator says otherwise."""
        return setting or sum(_limits(lane.model, self._options).max_rows // GUIDED_ROWS for lane in self._opened())

    async def slots_changed(self, told: int) -> None:
        """They never do."""
        await asyncio.Event().wait()

    async def broken(self) -> None:
        """Wait until a lane ends by itself, whose device or code has failed."""
        await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for lane in self._running:
            if lane.done() and not lane.cancelled() and (error := lane.exception()) is not None:
                log.error("engine_failed", error=repr(error))

    async def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncGenerator[Output]:
        """Make one picture; see ``Engine.generate``. Closing it waits for the step in progress to end."""
        lane = min(self._opened(), key=lambda one: one.load)
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output | None] = asyncio.Queue()
        ended: asyncio.Future[None] = loop.create_future()

        def end(error: Exception | None) -> None:
            outputs.put_nowait(None)
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        order = Order(
            task,
            pictures,
            resume,
            interrupt,
            tell=lambda output: _send(loop, outputs.put_nowait, output),
            ended=lambda error: _send(loop, end, error),
        )
        lane.submit(order)
        try:
            while (output := await outputs.get()) is not None:
                yield output
            ended.result()
        finally:
            order.stopped.set()
            await _settle(ended)

    def _open_lane(self, device: torch.device) -> Lane:
        options = self._options
        if device.type == "cuda":
            # Streams and captures are those of the thread's device, whatever device tensors are on.
            torch.cuda.set_device(device)
        model = open_model(self._source, device, options.precision, compiled=options.compiled)
        limits = _limits(model, options)
        try:
            with torch.inference_mode():
                previews = PreviewMap(model)
                warm_up(model, limits)
                # Not worth a look on a CPU, where a guided job fills a reproducible pass by itself.
                if device.type == "cuda" and places_agree(model, limits.fixed_rows):
                    limits = limits._replace(any_place=model.native_size)
        except torch.OutOfMemoryError as exc:
            raise _too_many_rows(model, limits) from exc
        return Lane(model, limits, options.intervals, previews)

    def _opened(self) -> list[Lane]:
        if not self._lanes:
            raise RuntimeError("The engine is not open: use it inside 'async with'")
        return self._lanes


def _limits(model: DiffusionModel, options: EngineOptions) -> Limits:
    is_cuda = model.device.type == "cuda"
    width, height = model.native_size
    return Limits(
        max_rows=options.max_rows or _rows_for(model),
        native_pixels=width * height,
        fixed_rows=options.reproducible_rows or (CUDA_FIXED_ROWS if is_cuda else CPU_FIXED_ROWS),
        padded=is_cuda,
    )


def _too_many_rows(model: DiffusionModel, limits: Limits) -> ConfigurationError:
    width, height = model.native_size
    return ConfigurationError(
        f"The memory of {model.device} does not suffice for passes of IMG2IMG_MAX_ROWS={limits.max_rows} and "
        f"IMG2IMG_REPRODUCIBLE_ROWS={limits.fixed_rows} rows at {width}x{height}: lower these, or free some of it"
    )


def _rows_for(model: DiffusionModel) -> int:
    if model.device.type == "cuda":
        return CUDA_ROWS
    return LARGE_CPU_ROWS if model.is_large else CPU_ROWS


def _send(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Call something in a loop from another thread, unless the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


async def _settle(ended: asyncio.Future[None]) -> None:
    """Wait until the lane has let go of a task, even if the waiting is itself cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError as exc:
            cancelled = exc
    ended.exception()  # marks it as seen: whoever closes early does not want it
    if cancelled is not None:
        raise cancelled

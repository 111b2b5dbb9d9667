"""What a worker asks of an engine.

An engine is opened once per worker (``async with``) and then asked for one picture after another.
It never blocks the event loop: heavy work runs in a thread of its own.
"""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

import msgspec
from PIL import Image as PillowImage

from img2img.jobs import Stage
from img2img.requests import Sampler


class Pictures(msgspec.Struct, frozen=True):
    """Decoded input, upright 8-bit RGB (``image``) and 8-bit L (``mask``, 255 is regenerated)."""

    image: PillowImage.Image | None = None
    mask: PillowImage.Image | None = None


class Task(msgspec.Struct, frozen=True):
    """One picture to make. Every default is resolved: the engine draws no seed and picks no size."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_steps: int
    strength: float
    guidance: float
    seed: int
    sampler: Sampler | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What an opened engine is: ``name`` for records, ``native_size`` in pixels (width, height)."""

    name: str
    model: str
    device: str
    native_size: tuple[int, int]


class Progress(msgspec.Struct, frozen=True):
    """``stage`` begins (step 0), or one more of its ``steps`` is done.

    Each one is a sign of life. Between two of them an engine may take the worker's phase limit, and between two
    steps its stall limit, or ten times what such steps took so far; beyond that it counts as hung.
    """

    stage: Stage
    step: int = 0
    steps: int = 0


class Notice(msgspec.Struct, frozen=True):
    """Something the user should know about the result, such as a prompt that was cut."""

    message: str


class Image(msgspec.Struct, frozen=True):
    """The finished picture, 8-bit RGB, always the last item."""

    picture: PillowImage.Image


Output = Progress | Notice | Image


class Engine(Protocol):
    """Opened before the first ``generate``; entering it loads the model and may take minutes."""

    @property
    def info(self) -> EngineInfo: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def generate(self, task: Task, pictures: Pictures) -> AsyncIterator[Output]:
        """Yield ``Progress`` as work goes on, ``Notice`` where there is one, and last an ``Image``.

        Closing the iterator (``aclose``) stops the work within one step and returns only when it
        has stopped; it may be closed at any time, and twice. The first output says that the task's turn
        has come: until then it waits for the tasks before it, as long as these get on.

        Raises:
            ModelRefused: this input cannot work on this model; another attempt would fail too.
            EngineFailed: anything else that went wrong; another attempt may work.
        """
        ...

"""What a worker asks of an engine.

An engine is opened once per worker (``async with``) and then asked for pictures, for as many at once as it has slots,
which may change while it is open.
It never blocks the event loop: heavy work runs in a thread of its own.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

import msgspec
from PIL import Image as PillowImage

from img2img.jobs import OnLost, Receipt, Stage, UpstreamCall
from img2img.requests import Sampler


class Pictures(msgspec.Struct, frozen=True):
    """Decoded input, upright 8-bit RGB (``image``) and 8-bit L (``mask``, 255 is regenerated)."""

    image: PillowImage.Image | None = None
    mask: PillowImage.Image | None = None


class Task(msgspec.Struct, frozen=True):
    """One picture to make. Every default is resolved: the engine draws no seed and picks no size.

    ``reproducible``: the same task makes the same bytes again, whatever is made beside it. ``previews`` asks for
    ``Preview`` outputs. ``deadline`` is on the clock of ``time.monotonic``: of tasks that compete, the one that is most
    pressed goes first.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_steps: int
    strength: float
    guidance: float
    seed: int
    sampler: Sampler | None = None
    reproducible: bool = False
    previews: bool = False
    deadline: float = math.inf


def steps_of(task: Task, pictures: Pictures) -> int:
    """As many steps as image-to-image takes: the last ``num_steps * strength``, at least one."""
    if pictures.image is None:
        return task.num_steps
    return max(1, min(int(task.num_steps * task.strength), task.num_steps))


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


class Shared(msgspec.Struct, frozen=True):
    """The steps are done, in so many ``passes`` through the network of ``rows``, its own and others', on average."""

    passes: int
    rows: float


class Notice(msgspec.Struct, frozen=True):
    """Something the user should know about the result, such as a prompt that was cut."""

    message: str


class Preview(msgspec.Struct, frozen=True):
    """What the picture looks like after ``step`` of its ``steps``: 8-bit RGB, small."""

    step: int
    steps: int
    picture: PillowImage.Image


class Checkpoint(msgspec.Struct, frozen=True):
    """The state after ``step`` of a task's ``steps``, for ``generate`` to go on from; ``data`` is the engine's own."""

    step: int
    steps: int
    data: bytes


class Sent(msgspec.Struct, frozen=True):
    """A call to another service follows, which may be billed. It is on record before the engine is asked for more.

    If the attempt ends without that call's answer, ``on_lost`` says what becomes of the job.
    """

    on_lost: OnLost


class Answered(msgspec.Struct, frozen=True):
    """The last call that was ``Sent`` has an answer, which brought no picture: it is off the record again.

    What it would have cost pays for the next one, unless it was ``billed`` all the same.
    """

    billed: bool = False


class Image(msgspec.Struct, frozen=True):
    """The finished picture, 8-bit RGB, always the last item.

    ``receipt`` tells what made it, ``upstream`` which call of another service did.
    """

    picture: PillowImage.Image
    receipt: Receipt | None = None
    upstream: UpstreamCall | None = None


Output = Progress | Shared | Notice | Preview | Checkpoint | Sent | Answered | Image


class Engine(Protocol):
    """Opened before the first ``generate``; entering it loads the model and may take minutes."""

    @property
    def info(self) -> EngineInfo: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def slots(self, setting: int) -> int:
        """How many tasks it can make use of at once, now; ``setting`` is the operator's number, or 0."""
        ...

    async def slots_changed(self, told: int) -> None:
        """Wait until ``slots`` may answer otherwise than ``told``, its last answer, if that ever happens."""
        ...

    async def broken(self) -> None:
        """Wait until the engine can make no picture any more, if that ever happens: its worker had better end."""
        ...

    def generate(
        self,
        task: Task,
        pictures: Pictures,
        resume: Checkpoint | None = None,
        interrupt: asyncio.Event | None = None,
    ) -> AsyncIterator[Output]:
        """Yield ``Progress`` as work goes on, ``Notice`` or ``Shared`` where there is one, and last an ``Image``.

        In between come ``Preview``, if the task asks for them, and a ``Checkpoint`` every few seconds of work. Given
        back as ``resume``, the latter makes the work go on after its step; one that does not fit the task or the model
        (of another release) is left aside, and the work begins anew. Once ``interrupt`` is set the engine ends after
        the step in progress: with a last ``Checkpoint``, if it has one to give, and no ``Image``.

        Closing the iterator (``aclose``) stops the work within one step and returns only when it
        has stopped; it may be closed at any time, and twice. The first output says that the task's turn
        has come: until then it waits for the tasks before it, as long as these get on.

        Raises:
            ModelRefused: this input cannot work on this model; another attempt would fail too.
            UpstreamBusy: another service takes no call now; the job waits in the queue, at no cost.
            EngineFailed: anything else that went wrong; another attempt may work.
        """
        ...

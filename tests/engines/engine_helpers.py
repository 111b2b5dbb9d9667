"""Short ways to ask an engine for a picture and to compare two of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image

from worker.engines import base
from worker.engines.base import Checkpoint, Output, Pictures, Task
from worker.engines.diffusion.batcher import Limits
from worker.engines.diffusion.lane import Intervals, Lane, Order
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.previews import PreviewMap

NO_PICTURES = Pictures()
LIMITS = Limits(max_rows=8, native_pixels=64 * 64)
EVERY_STEP = Intervals(checkpoint=1e-9, preview=0.0)


def task_of(**changes: object) -> Task:
    """A quick task at the bundled model's native size."""
    fields: dict[str, object] = {
        "prompt": "Change to a lion",
        "negative_prompt": "",
        "width": 256,
        "height": 256,
        "num_steps": 4,
        "strength": 0.75,
        "guidance": 3.5,
        "seed": 1,
    }
    return Task(**{**fields, **changes})


@dataclass
class Ordered:
    """An order in a lane, and what has come of it."""

    order: Order
    outputs: list[Output] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None

    @property
    def image(self) -> base.Image:
        if self.error is not None:
            raise self.error
        assert isinstance(self.outputs[-1], base.Image)
        return self.outputs[-1]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [output for output in self.outputs if isinstance(output, Checkpoint)]


@cache
def _previews(model: DiffusionModel) -> PreviewMap:
    with torch.inference_mode():
        return PreviewMap(model)


def lane_of(model: DiffusionModel, limits: Limits = LIMITS, intervals: Intervals = EVERY_STEP) -> Lane:
    """A lane without a thread: whoever has it calls ``turn``, under inference mode."""
    return Lane(model, limits, intervals, _previews(model))


def submit(
    lane: Lane,
    task: Task,
    pictures: Pictures = NO_PICTURES,
    resume: Checkpoint | None = None,
    interrupt: asyncio.Event | None = None,
) -> Ordered:
    def end(error: Exception | None) -> None:
        assert not ordered.ended, "an order ends once"
        ordered.ended, ordered.error = True, error

    ordered = Ordered(Order(task, pictures, resume, interrupt, lambda output: ordered.outputs.append(output), end))
    lane.submit(ordered.order)
    return ordered


@torch.inference_mode()
def work_until_ended(lane: Lane, *ordered: Ordered) -> None:
    """Turn until all of them have ended; whatever goes round for longer than any test needs is stuck."""
    turns = 0
    while not all(one.ended for one in ordered):
        lane.turn()
        turns += 1
        assert turns < 2000, "the lane gets nowhere"


def outputs_of(model: DiffusionModel, task: Task, pictures: Pictures = NO_PICTURES) -> list[Output]:
    """All that comes of a task alone; raises what it failed of."""
    lane = lane_of(model, intervals=Intervals())
    ordered = submit(lane, task, pictures)
    work_until_ended(lane, ordered)
    if ordered.error is not None:
        raise ordered.error
    return ordered.outputs


def picture_of(model: DiffusionModel, task: Task, pictures: Pictures = NO_PICTURES) -> Image.Image:
    """What the model paints, without a thread or an event loop."""
    last = outputs_of(model, task, pictures)[-1]
    assert isinstance(last, base.Image)
    return last.picture


def distance(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures, 0..255."""
    return float((_values(one) - _values(other)).abs().mean())


def furthest(one: Image.Image, other: Image.Image) -> float:
    """Largest absolute difference of two pictures, 0..255."""
    return float((_values(one) - _values(other)).abs().max())


async def collect(outputs: AsyncIterator[Output]) -> list[Output]:
    return [output async for output in outputs]


async def come_round() -> None:
    """Let the event loop do what it can do now."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what changes has no event to wait for
            await asyncio.sleep(0.005)


def _values(picture: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()


def solo(model: DiffusionModel, task: Task, pictures: Pictures) -> base.Image:
    """What the task becomes when nothing runs beside it."""
    lane = lane_of(model)
    ordered = submit(lane, task, pictures)
    work_until_ended(lane, ordered)
    return ordered.image

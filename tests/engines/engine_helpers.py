"""Short ways to ask an engine for a picture and to compare two of them."""

import asyncio
from collections.abc import AsyncIterator, Callable

import torch
from PIL import Image

from worker.engines import base
from worker.engines.base import Output, Pictures, Task
from worker.engines.diffusion.model import DiffusionModel
from worker.engines.diffusion.painting import paint

NO_PICTURES = Pictures()


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


def picture_of(model: DiffusionModel, task: Task, pictures: Pictures = NO_PICTURES) -> Image.Image:
    """What the model paints, without a thread or an event loop."""
    *_, last = paint(model, task, pictures)
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


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what changes has no event to wait for
            await asyncio.sleep(0.005)


def _values(picture: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()

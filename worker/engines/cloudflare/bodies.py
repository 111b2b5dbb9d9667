"""A task as the JSON body of a call. Plain CPU work where there are pictures: call it in a thread then."""

import base64
import io
from typing import Any, Final, Literal

import msgspec
from PIL import Image

from worker.engines.base import Pictures, Task

ImageForm = Literal["base64", "integers"]
"""How the input picture is written: ``image_b64``, or ``image``, in which each byte is a number."""
SEEDS: Final = 2**53
"""From here on a JSON number may change on its way: many readers hold it as a double."""
PNG_LEVEL: Final = 1  # the upload is short of time, not of bytes


def encode_body(task: Task, pictures: Pictures, form: ImageForm) -> bytes:
    """The body of a call that makes ``task``; pictures go at the task's size, as PNG.

    The upstream's schema has a mask in one form only, that of integers.
    """
    size = (task.width, task.height)
    body: dict[str, Any] = {
        "prompt": task.prompt,
        "width": task.width,
        "height": task.height,
        "num_steps": task.num_steps,
        "guidance": task.guidance,
        "seed": sent_seed(task.seed),
    }
    if task.negative_prompt:
        body["negative_prompt"] = task.negative_prompt
    if pictures.image is not None:
        body["strength"] = task.strength
        image = _png(pictures.image, size, Image.Resampling.LANCZOS)
        if form == "base64":
            body["image_b64"] = base64.b64encode(image).decode("ascii")
        else:
            body["image"] = list(image)
    if pictures.mask is not None:
        # Between 0 and 255 there is nothing that a mask could mean.
        body["mask"] = list(_png(pictures.mask, size, Image.Resampling.NEAREST))
    return msgspec.json.encode(body)


def sent_seed(seed: int) -> int:
    """The seed as it is sent for a task with this one."""
    return seed % SEEDS


def _png(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> bytes:
    if picture.size != size:
        picture = picture.resize(size, resampling)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()

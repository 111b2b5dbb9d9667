"""What the stand-in paints: the ``fake`` engine's pattern of the request, so that every field shows."""

import base64
import functools
import io
import json
import zlib
from typing import Any

from PIL import Image

from img2img.requests import Sampler
from worker.engines.base import Pictures, Task
from worker.engines.fake import draw

SIDE = 512


@functools.lru_cache(maxsize=32)
def paint(body: bytes) -> bytes:
    """The PNG that answers a request with this valid JSON ``body``.

    Raises:
        ValueError: ``image`` or ``mask`` is no picture.
    """
    return encoded(picture_of(json.loads(body)), "PNG")


def picture_of(fields: dict[str, Any]) -> Image.Image:
    """The same picture for the same fields, however its input was sent; 512x512 unless they say otherwise."""
    sent = fields.get("image")
    image = _decoded(bytes(sent) if sent is not None else base64.b64decode(fields.get("image_b64", "")), "RGB")
    mask = _decoded(bytes(fields.get("mask", ())), "L")
    return draw(task_of(fields), Pictures(image, mask))


def task_of(fields: dict[str, Any]) -> Task:
    """With the defaults of Cloudflare's schema."""
    return Task(
        prompt=fields["prompt"],
        negative_prompt=fields.get("negative_prompt", ""),
        width=fields.get("width", SIDE),
        height=fields.get("height", SIDE),
        num_steps=fields.get("num_steps", 20),
        strength=float(fields.get("strength", 1)),
        guidance=float(fields.get("guidance", 7.5)),
        seed=fields.get("seed", 0),
        sampler=Sampler.DPMPP_2M,
    )


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises ``side`` pixels a side."""
    small = encoded(Image.new("RGB", (1, 1)), "PNG")
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


def _decoded(data: bytes, mode: str) -> Image.Image | None:
    if not data:
        return None
    try:
        return Image.open(io.BytesIO(data)).convert(mode)
    except OSError as exc:
        raise ValueError("no picture") from exc

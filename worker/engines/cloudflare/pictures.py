"""The picture in an upstream's answer. Plain CPU work: call it in a thread."""

import base64
import io
from typing import Final

import msgspec
from PIL import Image

from img2img.images import HEADER_ERRORS, to_rgb
from worker.engines.cloudflare.exchange import MAX_ANSWER, UNREADABLE, Answer

MAGIC: Final = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
UNSAID: Final = frozenset({"", "application/octet-stream"})
WEBP: Final = (b"RIFF", b"WEBP")
BROKEN: Final = (*HEADER_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning, EOFError)


class NoPicture(Exception):
    """The answer holds no picture of the size that was asked for; ``str`` says what is wrong."""


class Inner(msgspec.Struct, frozen=True):
    image: str


class Enveloped(msgspec.Struct, frozen=True):
    result: Inner


def read_picture(answer: Answer, size: tuple[int, int]) -> Image.Image:
    """Every pixel of the picture, as 8-bit RGB; ``size`` is the (width, height) that it has to have.

    The first bytes decide what the file is: the upstream's models are known to call a JPEG a PNG.

    Raises:
        NoPicture: says what came instead.
    """
    if len(answer.body) > MAX_ANSWER:
        raise NoPicture(f"more than {MAX_ANSWER} bytes")
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        data = _from_json(answer.body)
    elif kind.startswith("image/") or kind in UNSAID:
        data = answer.body
    else:
        raise NoPicture(f"an answer of the type {kind[:40]!r}")
    return _decode(data, size)


def _from_json(body: bytes) -> bytes:
    """The bytes of ``{"result": {"image": base64}}``, or of the result alone."""
    try:
        content = msgspec.json.decode(body, type=Enveloped | None)
        inner = content.result if content else None
    except UNREADABLE:
        inner = None
    try:
        inner = inner or msgspec.json.decode(body, type=Inner)
        return base64.b64decode(inner.image.rpartition(",")[2], validate=True)
    except UNREADABLE as exc:
        raise NoPicture("JSON without an image") from exc
    except ValueError as exc:
        raise NoPicture("an image that is not base64") from exc


def _decode(data: bytes, size: tuple[int, int]) -> Image.Image:
    form = next((form for magic, form in MAGIC.items() if data.startswith(magic)), None)
    if form is None and (data[:4], data[8:12]) == WEBP:
        form = "WEBP"
    if form is None:
        raise NoPicture("bytes of no known picture format")
    try:
        picture = Image.open(io.BytesIO(data), formats=[form])
        if picture.size != size:
            width, height = picture.size
            raise NoPicture(f"a picture of {width}x{height} instead of {size[0]}x{size[1]}")
        # Pillow decodes many a damaged PNG without a word; its checksums tell. It needs opening again after that.
        picture.verify()
        return to_rgb(Image.open(io.BytesIO(data), formats=[form]))
    except BROKEN as exc:
        raise NoPicture("a damaged picture") from exc

"""What counts as a picture: the header check that the gateway makes and the worker relies on."""

import io
import warnings
from typing import Final

import msgspec
from PIL import Image, UnidentifiedImageError

from img2img.errors import InvalidImage

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXIF_ORIENTATION: Final = 0x0112
QUARTER_TURNS: Final = frozenset({5, 6, 7, 8})


class PictureLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on an encoded file (bytes) and on its decoded sides (pixels)."""

    file_bytes: int = 16 * 1024 * 1024
    side: int = 4096


class PictureInfo(msgspec.Struct, frozen=True):
    """What the header says; width and height are those of the picture turned upright."""

    format: str
    width: int
    height: int
    bytes: int


def open_picture(field: str, data: bytes, limits: PictureLimits) -> Image.Image:
    """Open ``data`` lazily (no pixel is decoded) and refuse what the service does not take.

    Raises:
        InvalidImage: empty, too large, unknown, animated, or with sides beyond the limit.
    """
    if not data:
        raise InvalidImage(field, f"'/{field}' is empty: send the bytes of an image file")
    if len(data) > limits.file_bytes:
        raise InvalidImage(field, f"'/{field}' must be at most {limits.file_bytes} bytes, not {len(data)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as exc:
        raise _too_many_pixels(field, limits) from exc
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as exc:
        raise InvalidImage(field, f"'/{field}' is not an image: send the bytes of a {_named(FORMATS)} file") from exc
    if max(picture.size) > limits.side:
        raise _too_many_pixels(field, limits)
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        raise InvalidImage(field, f"'/{field}' is animated ({frames} frames): send one still picture")
    return picture


def probe(field: str, data: bytes, limits: PictureLimits) -> PictureInfo:
    """Read format and size from the header of an encoded file.

    Raises:
        InvalidImage: see :func:`open_picture`.
    """
    with open_picture(field, data, limits) as picture:
        width, height = picture.size
        if picture.getexif().get(EXIF_ORIENTATION) in QUARTER_TURNS:
            width, height = height, width
        return PictureInfo(picture.format or "", width, height, len(data))


def _too_many_pixels(field: str, limits: PictureLimits) -> InvalidImage:
    return InvalidImage(field, f"'/{field}' must be at most {limits.side}x{limits.side} pixels: scale it down")


def _named(formats: tuple[str, ...]) -> str:
    return f"{', '.join(formats[:-1])} or {formats[-1]}"

"""What counts as a picture: the header check that the gateway makes and the worker relies on."""

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
from PIL import Image

from img2img.errors import InvalidImage

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MPO: Final = "MPO"
EXIF_ORIENTATION: Final = 0x0112
UPRIGHT: Final = 1
QUARTER_TURNS: Final = frozenset({5, 6, 7, 8})

# What Pillow's readers raise for headers that end early or contradict themselves.
HEADER_ERRORS: Final = (OSError, ValueError, SyntaxError, LookupError, TypeError, struct.error)
# A header is read in pieces, in Python. Real files need a few hundred, and a GIF two for every 256 bytes; one
# made of nothing but the smallest pieces would take seconds.
FREE_READS: Final = 10_000
BYTES_PER_READ: Final = 64

SCAN: Final = b"\xff\xda"
MAX_SCANS: Final = 1000
"""A JPEG has a dozen at most. A thousand take a second at 4096x4096, and 16 MiB would have room for half a million, in
pieces too small to be stopped between. Other parts of 16 MiB hold these two bytes by chance, some 250 times."""

WHITE: Final = (255, 255, 255, 255)
SIXTEEN_BIT_MODES: Final = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
SIXTEEN_TO_EIGHT: Final = 1 / 257  # 65535 / 257 is exactly 255


class PictureLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on an encoded file (bytes) and on its decoded sides (pixels)."""

    file_bytes: int = 16 * 1024 * 1024
    side: int = 4096


class PictureInfo(msgspec.Struct, frozen=True):
    """What the header says, and the file's SHA-256; width and height are those of the picture turned upright.

    ``sha256`` is lower-case hexadecimal, and empty in records of releases that did not take it down.
    """

    format: str
    width: int
    height: int
    bytes: int
    sha256: str = ""


class _Source(io.BytesIO):
    """An encoded file that may be read in ``reads_left`` pieces; None lifts the limit."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads_left: int | None = FREE_READS + len(data) // BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        if self.reads_left is not None:
            self.reads_left -= 1
            if self.reads_left < 0:
                raise OSError("the header has too many pieces")
        return super().read(size)


def open_picture(field: str, data: bytes, limits: PictureLimits) -> Image.Image:
    """Open ``data`` lazily (no pixel is decoded) and refuse what the service does not take.

    Raises:
        InvalidImage: empty, too large, unknown, animated, with sides beyond the limit, or made to take long.
    """
    if not data:
        raise InvalidImage(field, f"'/{field}' is empty: send the bytes of an image file")
    if len(data) > limits.file_bytes:
        raise InvalidImage(field, f"'/{field}' must be at most {limits.file_bytes} bytes, not {len(data)}")
    try:
        with _quiet():
            source = _Source(data)
            picture = Image.open(source, formats=FORMATS)
            # Phones add a preview or a depth map to a JPEG (MPO); its first picture is the photo.
            animated = picture.format != MPO and getattr(picture, "is_animated", False)
            source.reads_left = None
    except Image.DecompressionBombError as exc:
        raise _too_many_pixels(field, limits) from exc
    except HEADER_ERRORS as exc:
        raise InvalidImage(field, f"'/{field}' is not an image: send the bytes of a {_named(FORMATS)} file") from exc
    if max(picture.size) > limits.side:
        raise _too_many_pixels(field, limits)
    if animated:
        raise InvalidImage(field, f"'/{field}' is animated: send one still picture")
    if picture.format in ("JPEG", MPO) and data.count(SCAN) > MAX_SCANS:
        raise InvalidImage(field, f"'/{field}' has more than {MAX_SCANS} scans: save it anew")
    return picture


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it is damaged; no pixel is decoded."""
    try:
        with _quiet():
            # Not the picture's own method: a PNG's decodes every pixel to look for EXIF behind them.
            return int(Image.Image.getexif(picture).get(EXIF_ORIENTATION, UPRIGHT))
    except Exception:
        # Pillow raises whatever it trips over in damaged EXIF, and the picture is good all the same.
        return UPRIGHT


def probe(field: str, data: bytes, limits: PictureLimits) -> PictureInfo:
    """Read format and size from the header of an encoded file, and hash it: 16 MiB take some 10 ms.

    Raises:
        InvalidImage: see :func:`open_picture`.
    """
    with open_picture(field, data, limits) as picture:
        width, height = picture.size
        if orientation(picture) in QUARTER_TURNS:
            width, height = height, width
        file_format = "JPEG" if picture.format == MPO else picture.format or ""
        return PictureInfo(file_format, width, height, len(data), hashlib.sha256(data).hexdigest())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about odd files: each is either refused here or good enough."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _too_many_pixels(field: str, limits: PictureLimits) -> InvalidImage:
    return InvalidImage(field, f"'/{field}' must be at most {limits.side}x{limits.side} pixels: scale it down")


def _named(formats: tuple[str, ...]) -> str:
    return f"{', '.join(formats[:-1])} or {formats[-1]}"


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, on white where it is transparent. It reads every pixel: call it in a thread.

    Raises:
        One of ``HEADER_ERRORS``, or ``EOFError``: it is damaged.
    """
    picture.load()
    picture = _to_eight_bit(picture)
    if picture.mode == "P" and picture.palette is None:
        raise ValueError("its palette is missing")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return picture.convert("RGB")


def _to_eight_bit(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bit; Pillow's own conversion cuts everything above 255 to white."""
    if picture.mode not in SIXTEEN_BIT_MODES:
        return picture
    return picture.convert("F").point(lambda value: value * SIXTEEN_TO_EIGHT + 0.5).convert("L")

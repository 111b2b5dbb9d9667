"""Pictures on their way in and out of an engine: decoding, encoding.

The gateway has read the headers (``img2img.images.probe``); only here is every pixel decoded, so a file that
ends early or holds garbage is found here. All of it is plain CPU work: call it in a thread.
"""

import io
from typing import Final

from PIL import Image

from img2img.errors import InvalidImage
from img2img.images import HEADER_ERRORS, PictureLimits, open_picture, orientation, to_rgb
from img2img.jobs import PreviewPicture
from img2img.requests import Inputs, OutputFormat
from worker.engines.base import Pictures
from worker.metadata import Metadata, exif_block, png_chunks

MASK_THRESHOLD: Final = 128
TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Measured on a 1024x1024 drawing and on noise: level 1 takes a quarter to two thirds of level 6's time and
# its files are at most a quarter larger; WebP method 2 takes half of the default 4's time.
PNG_LEVEL: Final = 1
WEBP_METHOD: Final = 2
MAX_JPEG_EXIF: Final = 65_533
"""A segment's length is a 16-bit number that counts itself."""
MAX_WEBP_EXIF: Final = 2**31
"""A chunk's has 32 bits."""

PREVIEW_SIDE: Final = 256
PREVIEW_QUALITY: Final = 80


def decode_inputs(inputs: Inputs, limits: PictureLimits) -> Pictures:
    """Decode a job's files: ``image`` upright 8-bit RGB on white, ``mask`` 8-bit L of 0 and 255.

    Mask pixels of luminance 128 and above become 255 (regenerate), the others 0 (keep); a mask of another
    size is resized to the image's, without inventing grey.

    Raises:
        InvalidImage: names the field whose bytes are truncated, corrupt or not a picture the service takes.
    """
    image = None if inputs.image is None else _load("image", inputs.image, limits)
    mask = None if inputs.mask is None else _to_mask(_load("mask", inputs.mask, limits))
    if image is not None and mask is not None and mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
    return Pictures(image=image, mask=mask)


def encode_picture(
    picture: Image.Image, output_format: OutputFormat, quality: int, metadata: Metadata | None = None
) -> bytes:
    """Encode an RGB picture; ``quality`` is 1..100 and has no effect on PNG, which is lossless.

    The same pixels and ``metadata`` give the same bytes.
    """
    buffer = io.BytesIO()
    match output_format:
        case OutputFormat.PNG:
            chunks = None if metadata is None else png_chunks(metadata)
            picture.save(buffer, "PNG", compress_level=PNG_LEVEL, pnginfo=chunks)
        case OutputFormat.WEBP:
            exif = b"" if metadata is None else exif_block(metadata, MAX_WEBP_EXIF)
            picture.save(buffer, "WEBP", quality=quality, method=WEBP_METHOD, exif=exif)
        case OutputFormat.JPEG:
            exif = b"" if metadata is None else exif_block(metadata, MAX_JPEG_EXIF)
            picture.save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def encode_preview(picture: Image.Image) -> PreviewPicture:
    """Encode an RGB picture as a small WebP: one with a side above 256 pixels is scaled down."""
    if max(picture.size) > PREVIEW_SIDE:
        picture = picture.copy()
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    data = encode_picture(picture, OutputFormat.WEBP, PREVIEW_QUALITY)
    return PreviewPicture(OutputFormat.WEBP.media_type, picture.width, picture.height, data)


def _load(field: str, data: bytes, limits: PictureLimits) -> Image.Image:
    """Decode every pixel, as 8-bit RGB, and turn the picture upright.

    Not by ``ImageOps.exif_transpose``, which also writes the other EXIF entries anew and fails on damaged ones.
    """
    picture = open_picture(field, data, limits)
    turn = TURNS.get(orientation(picture))
    try:
        rgb = to_rgb(picture)
    except (*HEADER_ERRORS, EOFError) as exc:
        raise InvalidImage(
            field, f"'/{field}' is cut off or damaged: send the whole file again, or save it anew"
        ) from exc
    return rgb if turn is None else rgb.transpose(turn)


def _to_mask(picture: Image.Image) -> Image.Image:
    return picture.convert("L").point([0] * MASK_THRESHOLD + [255] * (256 - MASK_THRESHOLD))

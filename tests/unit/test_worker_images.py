"""Every picture a client may send comes out upright, in 8 bits, on white, or is refused by name."""

import io
import struct
import zlib

import pytest
from PIL import Image, ImageChops

from img2img.errors import InvalidImage
from img2img.images import EXIF_ORIENTATION, PictureLimits
from img2img.requests import Inputs, OutputFormat
from worker.images import decode_inputs, encode_picture, encode_preview

LIMITS = PictureLimits()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = decode_inputs(Inputs(data), LIMITS).image
    assert image is not None
    assert image.mode == "RGB"
    return image


def decoded_mask(mask: Image.Image, size: tuple[int, int] = (4, 4)) -> Image.Image:
    pictures = decode_inputs(Inputs(encoded(Image.new("RGB", size)), encoded(mask)), LIMITS)
    assert pictures.mask is not None
    assert pictures.mask.mode == "L"
    return pictures.mask


def two_halves(left: object, right: object, mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def close(pixel: tuple[int, ...], colour: tuple[int, ...], by: int = 12) -> bool:
    return all(abs(one - other) <= by for one, other in zip(pixel, colour, strict=True))


def sixteen_bit_png(colour_type: int, pixels: list[tuple[int, ...]]) -> bytes:
    """One row of 16-bit pixels; Pillow itself writes only grey ones."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + b"".join(struct.pack(">H", value) for pixel in pixels for value in pixel)
    header = struct.pack(">IIBBBBB", len(pixels), 1, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_keeps_its_colours(file_format):
    picture = decoded(encoded(two_halves(RED, BLUE), file_format))

    assert picture.size == (64, 32)
    assert close(picture.getpixel((8, 16)), RED)
    assert close(picture.getpixel((56, 16)), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_rotated_photograph_is_turned_upright(orientation, file_format):
    """A camera stores the upright picture turned by the inverse of what its EXIF entry asks for."""
    upright = Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 32, 16))
    upright.paste(BLUE, (32, 16, 64, 32))
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation

    picture = decoded(encoded(stored, file_format, exif=exif))

    assert picture.size == (64, 32)
    assert close(picture.getpixel((8, 8)), RED)
    assert close(picture.getpixel((56, 24)), BLUE)
    assert close(picture.getpixel((56, 8)), WHITE)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_damaged_exif_does_not_cost_the_picture(exif):
    assert close(decoded(encoded(two_halves(RED, BLUE), "WEBP", exif=exif)).getpixel((8, 8)), RED)


def test_sixteen_bit_grey_is_scaled_not_cut():
    data = sixteen_bit_png(0, [(0,), (257,), (32896,), (65535,)])
    assert Image.open(io.BytesIO(data)).mode == "I;16"

    picture = decoded(data)

    assert [picture.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_sixteen_bit_colour_and_alpha():
    colour = decoded(sixteen_bit_png(2, [(65535, 0, 32896)]))
    transparent = decoded(sixteen_bit_png(6, [(0, 0, 0, 0), (65535, 0, 0, 65535)]))

    assert colour.getpixel((0, 0)) == (255, 0, 128)
    assert [transparent.getpixel((x, 0)) for x in range(2)] == [WHITE, RED]


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP"])
def test_a_palette_becomes_colours(file_format):
    picture = decoded(encoded(two_halves(RED, BLUE).quantize(2), file_format))

    assert close(picture.getpixel((8, 8)), RED)
    assert close(picture.getpixel((56, 8)), BLUE)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(file_format):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 4, 8))

    picture = decoded(encoded(palette, file_format, transparency=0))

    assert picture.getpixel((1, 1)) == WHITE
    assert picture.getpixel((6, 1)) == RED


def test_a_transparent_colour_without_alpha_is_white():
    data = encoded(two_halves(BLUE, RED), transparency=BLUE)

    assert decoded(data).getpixel((8, 8)) == WHITE
    assert decoded(data).getpixel((56, 8)) == RED


def test_alpha_is_laid_on_white():
    clear, half = (0, 0, 0, 0), (255, 0, 0, 128)

    picture = decoded(encoded(two_halves(clear, half, "RGBA")))

    assert picture.getpixel((8, 8)) == WHITE
    assert close(picture.getpixel((56, 8)), (255, 127, 127), by=1)


def test_grey_with_alpha_is_laid_on_white():
    picture = decoded(encoded(two_halves((0, 0), (0, 255), "LA")))

    assert picture.getpixel((8, 8)) == WHITE
    assert picture.getpixel((56, 8)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_colour(mode):
    assert decoded(encoded(two_halves(0, 255, mode))).getpixel((56, 8)) == WHITE


def test_a_cmyk_jpeg():
    cyan = (255, 0, 0, 0)

    assert close(decoded(encoded(Image.new("CMYK", (32, 32), cyan), "JPEG")).getpixel((9, 9)), (0, 255, 255))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_file_that_ends_early_is_refused_by_name(file_format, field):
    whole = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), file_format)
    data = whole[: len(whole) * 3 // 5]
    inputs = Inputs(data) if field == "image" else Inputs(encoded(Image.new("RGB", (64, 64))), data)

    with pytest.raises(InvalidImage, match=f"'/{field}' is .*: s") as caught:
        decode_inputs(inputs, LIMITS)

    assert caught.value.field == field


@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_png_without_its_palette_is_refused(field):
    """Its pixels are numbers of colours that are not there; the header alone does not tell."""
    data = encoded(Image.new("P", (4, 4)))
    begin = data.index(b"PLTE") - 4
    bare = data[:begin] + data[begin + 12 + int.from_bytes(data[begin : begin + 4]) :]
    inputs = Inputs(image=bare) if field == "image" else Inputs(image=encoded(Image.new("RGB", (4, 4))), mask=bare)

    with pytest.raises(InvalidImage, match=f"'/{field}' is cut off or damaged"):
        decode_inputs(inputs, PictureLimits())


def test_a_png_with_damaged_pixels_is_refused():
    data = bytearray(encoded(Image.effect_noise((64, 64), 90)))
    data[len(data) // 2] ^= 0xFF

    with pytest.raises(InvalidImage, match="send the whole file again"):
        decode_inputs(Inputs(bytes(data)), LIMITS)


def test_what_is_no_picture_is_refused():
    with pytest.raises(InvalidImage, match="'/image' is not an image"):
        decode_inputs(Inputs(b"<svg/>"), LIMITS)


def test_no_pictures():
    pictures = decode_inputs(Inputs(), LIMITS)

    assert (pictures.image, pictures.mask) == (None, None)


@pytest.mark.parametrize(
    ("pixel", "mode", "regenerated"),
    [
        (127, "L", 0),
        (128, "L", 255),
        ((255, 255, 0), "RGB", 255),
        ((0, 0, 255), "RGB", 0),
        ((0, 0, 0, 0), "RGBA", 255),
        ((0, 0, 0, 255), "RGBA", 0),
        (1, "1", 255),
    ],
)
def test_a_mask_regenerates_what_is_light(pixel, mode, regenerated):
    assert decoded_mask(Image.new(mode, (4, 4), pixel)).getpixel((0, 0)) == regenerated


def test_a_mask_of_another_size_follows_the_image_without_grey():
    mask = decoded_mask(two_halves(0, 255, "L", (10, 10)), size=(33, 17))

    assert mask.size == (33, 17)
    assert {value for _, value in mask.getcolors()} == {0, 255}
    assert [mask.getpixel((x, 8)) for x in (0, 15, 17, 32)] == [0, 0, 255, 255]


def test_a_mask_follows_the_upright_image():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image = encoded(Image.new("RGB", (64, 32)), "JPEG", exif=exif)

    pictures = decode_inputs(Inputs(image, encoded(Image.new("L", (64, 32)))), LIMITS)

    assert pictures.image.size == pictures.mask.size == (32, 64)


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_encoding(output_format):
    picture = two_halves(RED, BLUE)

    back = Image.open(io.BytesIO(encode_picture(picture, output_format, 90)))

    assert back.format == output_format.value.upper()
    assert back.size == picture.size
    assert close(back.convert("RGB").getpixel((8, 8)), RED)


def test_png_is_lossless():
    picture = Image.effect_noise((64, 64), 90).convert("RGB")

    back = Image.open(io.BytesIO(encode_picture(picture, OutputFormat.PNG, 1)))

    assert ImageChops.difference(back.convert("RGB"), picture).getbbox() is None


@pytest.mark.parametrize("output_format", [OutputFormat.WEBP, OutputFormat.JPEG])
def test_quality_costs_bytes(output_format):
    picture = Image.effect_noise((128, 128), 60).convert("RGB")

    assert len(encode_picture(picture, output_format, 30)) < len(encode_picture(picture, output_format, 95))


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 48), (64, 48)), ((256, 256), (256, 256)), ((512, 1024), (128, 256)), ((320, 10), (256, 8))],
)
def test_a_preview_is_a_small_webp(size, shown):
    picture = Image.new("RGB", size, (255, 0, 0))

    preview = encode_preview(picture)

    assert picture.size == size
    with Image.open(io.BytesIO(preview.image)) as opened:
        assert (opened.format, opened.size) == ("WEBP", shown)
    assert (preview.media_type, preview.width, preview.height) == ("image/webp", *shown)

"""What counts as a picture: formats, sizes, and files that mean harm."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from img2img.errors import InvalidImage
from img2img.images import PictureInfo, PictureLimits, open_picture, orientation, probe

LIMITS = PictureLimits()
NOT_AN_IMAGE = "'/image' is not an image: send the bytes of a PNG, JPEG, WEBP, GIF or BMP file"
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(file_format: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def animation(file_format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of RGB pixels with ``chunks`` in its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(64 * (64 * 3 + 1))))
    return SIGNATURE + header + b"".join(chunks) + pixels + chunk(b"IEND")


def refusal(data: bytes, limits: PictureLimits = LIMITS) -> str:
    with pytest.raises(InvalidImage) as caught:
        probe("image", data, limits)
    assert caught.value.field == "image"
    return str(caught.value)


class TestGoodPictures:
    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    def test_every_format_tells_its_size(self, file_format: str) -> None:
        data = encode(file_format)
        assert probe("image", data, LIMITS) == PictureInfo(file_format, 40, 30, len(data), sha256(data).hexdigest())

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    def test_every_kind_of_png_is_taken(self, mode: str) -> None:
        assert probe("mask", encode("PNG", mode=mode), LIMITS).format == "PNG"

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize("value", range(1, 9))
    def test_a_photo_held_sideways_has_its_sides_swapped(self, file_format: str, value: int) -> None:
        info = probe("image", encode(file_format, exif=turned(value)), LIMITS)
        assert (info.width, info.height) == ((30, 40) if value >= 5 else (40, 30))

    def test_the_photo_of_a_phones_multi_picture_file_is_taken(self) -> None:
        """MPO: a JPEG with a preview behind it. It is no animation."""
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30)).save(
            buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))], exif=turned(6)
        )
        data = buffer.getvalue()
        assert probe("image", data, LIMITS) == PictureInfo("JPEG", 30, 40, len(data), sha256(data).hexdigest())

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    @pytest.mark.parametrize(
        "damage", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 99]
    )
    def test_damaged_exif_is_no_reason_to_refuse(self, file_format: str, damage: bytes) -> None:
        assert probe("image", encode(file_format, exif=damage), LIMITS).width == 40

    def test_exif_written_as_text_counts(self) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", "\nexif\n  10\n" + turned(6).tobytes().hex())
        assert probe("image", encode("PNG", pnginfo=info), LIMITS).width == 30

    def test_the_largest_sides_are_taken_and_no_pixel_is_decoded(self) -> None:
        """The pixels of this file are missing altogether; the worker will tell."""
        cut = png(size=(4096, 4096))[: len(SIGNATURE) + 25 + 20]
        assert probe("image", cut, LIMITS) == PictureInfo("PNG", 4096, 4096, len(cut), sha256(cut).hexdigest())
        with open_picture("image", cut, LIMITS) as picture:
            assert orientation(picture) == 1

    def test_a_picture_can_be_loaded_in_any_number_of_pieces(self) -> None:
        """The bound on pieces is the header's alone."""
        data = zlib.compress(bytes(64 * (64 * 3 + 1)), 0)
        crumbs = b"".join(chunk(b"IDAT", data[i : i + 1]) for i in range(len(data)))
        head = png()[: len(SIGNATURE) + 25]
        with open_picture("image", head + crumbs + chunk(b"IEND"), LIMITS) as picture:
            picture.load()
            assert picture.size == (64, 64)


class TestRefusals:
    def test_nothing_is_no_picture(self) -> None:
        assert refusal(b"") == "'/image' is empty: send the bytes of an image file"

    @pytest.mark.parametrize(
        "data",
        [
            b"a",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.7",
            bytes(1000),
            b"GIF89a",
            b"BM",
            SIGNATURE,
            b"\xff\xd8\xff",
            b"RIFF\x00\x00\x00\x00WEBP",
            encode("TIFF"),
            encode("ICO", size=(32, 32)),
            encode("PPM"),
        ],
        ids=lambda data: repr(data[:8]),
    )
    def test_other_bytes_are_no_picture(self, data: bytes) -> None:
        assert refusal(data) == NOT_AN_IMAGE

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    def test_a_header_cut_anywhere_is_refused_or_still_tells_the_size(self, file_format: str) -> None:
        data = encode(file_format)
        told: set[object] = set()
        for end in range(1, len(data)):
            try:
                info = probe("image", data[:end], LIMITS)
            except InvalidImage as error:
                told.add(str(error))
            else:
                told.add((info.width, info.height))
        assert told <= {NOT_AN_IMAGE, (40, 30)}

    def test_a_jpeg_of_very_many_scans_is_refused(self) -> None:
        """Each costs a pass over all of the picture, and may be a few bytes long."""
        data = encode("JPEG", progressive=True)
        last, end = data.rindex(b"\xff\xda"), len(data) - 2
        assert probe("image", data[:end] + 900 * data[last:end] + data[end:], LIMITS).format == "JPEG"
        many = refusal(data[:end] + 1000 * data[last:end] + data[end:])
        assert many == "'/image' has more than 1000 scans: save it anew"

    @pytest.mark.parametrize("size", [(0, 0), (0, 64), (64, 0)])
    def test_a_picture_without_area_is_none(self, size: tuple[int, int]) -> None:
        assert refusal(png(size=size)) == NOT_AN_IMAGE

    @pytest.mark.parametrize(
        "size", [(100_000, 100_000), (2**31 - 1, 1), (4097, 16), (16, 4097), (12_000, 12_000), (13_000, 8000)]
    )
    def test_too_many_pixels_are_refused_from_the_header_alone(self, size: tuple[int, int]) -> None:
        """Also between Pillow's warning about bombs and its error."""
        assert refusal(png(size=size)) == "'/image' must be at most 4096x4096 pixels: scale it down"

    def test_too_many_bytes_are_refused_unopened(self) -> None:
        data = encode("BMP")
        assert refusal(data, PictureLimits(file_bytes=len(data) - 1)) == (
            f"'/image' must be at most {len(data) - 1} bytes, not {len(data)}"
        )

    @pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
    def test_animations_are_refused(self, file_format: str) -> None:
        assert refusal(animation(file_format)) == "'/image' is animated: send one still picture"

    def test_the_field_is_named(self) -> None:
        with pytest.raises(InvalidImage, match="'/mask' is not an image") as caught:
            probe("mask", b"x", LIMITS)
        assert caught.value.field == "mask"


class TestBombs:
    """Small effort of the sender, small effort of ours."""

    @pytest.mark.parametrize(
        "text",
        [
            chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000))),
            chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000))),
            chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000))) * 100,
            chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50_000_000))),
        ],
        ids=["zTXt", "iTXt", "many zTXt", "iCCP"],
    )
    def test_text_or_a_colour_profile_that_inflates_is_refused(self, text: bytes) -> None:
        assert refusal(png(text)) == NOT_AN_IMAGE

    @pytest.mark.parametrize(
        "build",
        [
            lambda: png(chunk(b"aaAa") * 300_000),
            lambda: png(chunk(b"tEXt", b"k\0v") * 300_000),
            lambda: _after_start(b"\xff" * 3_000_000),
            lambda: _after_start(b"\xff\xfe\x00\x02" * 500_000),
            lambda: _after_palette(b"\x21\xfe\x01a\x00" * 500_000),
            lambda: _after_palette(b"\x21\xfe" + b"\x01a" * 1_000_000 + b"\x00"),
        ],
        ids=["PNG chunks", "PNG texts", "JPEG fill bytes", "JPEG comments", "GIF comments", "GIF sub-blocks"],
    )
    def test_a_header_in_too_many_pieces_is_refused(self, build: Callable[[], bytes]) -> None:
        assert refusal(build()) == NOT_AN_IMAGE

    def test_the_frames_of_an_animation_are_not_counted(self) -> None:
        """A million of them is refused as two are."""
        data = encode("GIF", size=(1, 1))
        frame = data[data.index(b",") : -1]
        assert "animated" in refusal(data[:-1] + frame * 300_000 + b";")

    @settings(max_examples=300, deadline=None)
    @given(
        seed=st.sampled_from(
            [
                *(encode(name) for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP")),
                *(encode(name, exif=turned(6)) for name in ("PNG", "JPEG", "WEBP")),
                *(animation(name) for name in ("PNG", "GIF", "WEBP")),
            ]
        ),
        places=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=8),
        end=st.integers(1, 5000),
    )
    def test_damage_is_told_in_one_way_only_and_without_a_warning(
        self, seed: bytes, places: list[tuple[int, int]], end: int
    ) -> None:
        data = bytearray(seed)
        for place, byte in places:
            data[place % len(data)] = byte
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                info = probe("image", bytes(data[:end]), LIMITS)
            except InvalidImage:
                return
        assert 0 < info.width <= LIMITS.side
        assert 0 < info.height <= LIMITS.side


def _after_start(filling: bytes) -> bytes:
    data = encode("JPEG")
    return data[:2] + filling + data[2:]


def _after_palette(filling: bytes) -> bytes:
    data = encode("GIF", size=(1, 1))
    place = data.index(b",")
    return data[:place] + filling + data[place:]

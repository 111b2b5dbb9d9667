"""What a picture's file says of itself: as web UIs read it, the same for the same request, and never in the way."""

import io
import json
import re
import struct
from typing import Any

import msgspec
import pytest
from PIL import Image

from img2img.images import PictureInfo
from img2img.jobs import JobSpec, Receipt
from img2img.requests import JobOptions, OutputFormat, Parameters, Sampler
from worker.engines import base
from worker.images import MAX_JPEG_EXIF, encode_picture
from worker.metadata import SECOND_AT, UNDEFINED, USER_COMMENT, describe, exif_block

EXIF_DIRECTORY, IMAGE_DESCRIPTION = 0x8769, 0x010E
# As AUTOMATIC1111's web UI takes the last line apart.
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
RECEIPT = Receipt(
    pixels_sha256="ab" * 32,
    model="emoji-sd",
    revision="0123456789abcdef",
    weights={"unet": "cd" * 32},
    sampler="euler_a",
    steps=3,
    rows=2,
    precision="float32",
    device="cpu",
    versions={"torch": "2.13.0"},
)
INPUT = PictureInfo("PNG", 64, 48, 123, "ef" * 32)


def spec_of(options: JobOptions | None = None, **parameters: Any) -> JobSpec:
    fields: dict[str, Any] = {"prompt": "a lion", "strength": 0.75, "num_steps": 4, "image": INPUT} | parameters
    return JobSpec(
        id="0-1",
        account="acme",
        parameters=Parameters(**fields),
        options=options or JobOptions(reproducible=True),
        seed=2**63 + 1,
        fingerprint="f",
    )


def image_of(receipt: Receipt | None = RECEIPT) -> base.Image:
    return base.Image(Image.linear_gradient("L").convert("RGB"), receipt)


def file_of(spec: JobSpec, output_format: OutputFormat = OutputFormat.PNG, receipt: Receipt | None = RECEIPT) -> bytes:
    image = image_of(receipt)
    return encode_picture(image.picture, output_format, 90, describe(spec, image))


def texts(data: bytes) -> tuple[str, str]:
    """The parameters and the record, as programs find them that know nothing of us."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.format == "PNG":
            return picture.info.get("parameters", ""), picture.info.get("img2img", "")
        exif = picture.getexif()
        comment = exif.get_ifd(EXIF_DIRECTORY).get(USER_COMMENT, b"UNICODE\0")
        assert comment.startswith(b"UNICODE\0")
        return comment[8:].decode("utf-16-be"), exif.get(IMAGE_DESCRIPTION, "")


def parsed(parameters: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, as a web UI understands them."""
    *lines, last = parameters.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    return prompt, negative, {name: value.strip('"') for name, value in PARAMETER.findall(last)}


@pytest.mark.parametrize("output_format", list(OutputFormat))
@pytest.mark.parametrize("prompt", ["a lion", "Löwe 🦁, „groß“\nin two lines", 'Steps: "x", <&>'])
def test_a_web_ui_reads_what_made_the_picture(output_format: OutputFormat, prompt: str) -> None:
    spec = spec_of(prompt=prompt, negative_prompt="dull, grey")

    parameters, _ = texts(file_of(spec, output_format))

    assert parsed(parameters) == (
        prompt,
        "dull, grey",
        {
            "Steps": "4",
            "Sampler": "Euler a",
            "CFG scale": "7.5",
            "Seed": "9223372036854775809",
            "Size": "256x256",
            "Model hash": "0123456789",
            "Model": "emoji-sd",
            "Denoising strength": "0.75",
        },
    )


def test_what_there_is_not_is_left_out() -> None:
    """No input has no denoising strength, no receipt no model; the sampler is then the one asked for."""
    spec = spec_of(JobOptions(sampler=Sampler.DPMPP_2M), image=None)

    parameters, record = texts(file_of(spec, receipt=None))

    assert parsed(parameters) == (
        "a lion",
        "",
        {"Steps": "4", "Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "9223372036854775809", "Size": "256x256"},
    )
    assert set(json.loads(record)) == {"parameters", "options"}


def test_a_name_with_a_comma_is_quoted() -> None:
    receipt = msgspec.structs.replace(RECEIPT, model="lions, large: v2")

    parameters, _ = texts(file_of(spec_of(), receipt=receipt))

    assert parsed(parameters)[2]["Model"] == "lions, large: v2"


def test_every_sampler_has_a_web_uis_name() -> None:
    names = {
        parsed(texts(file_of(spec_of(JobOptions(sampler=sampler)), receipt=None))[0])[2]["Sampler"]
        for sampler in Sampler
    }

    assert names == {"DPM++ 2M", "DDIM", "Euler", "Euler a"}


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_the_record_makes_the_picture_again(output_format: OutputFormat) -> None:
    """Size and seed as used, the options that shape the picture, the input's digest, the whole receipt."""
    options = JobOptions(
        sampler=Sampler.EULER_A, output_format=output_format, reproducible=True, priority=3, deadline_seconds=60
    )

    record = json.loads(texts(file_of(spec_of(options, prompt="Löwe\0"), output_format))[1])

    shown = {"format": "PNG", "width": 64, "height": 48, "bytes": 123, "sha256": "ef" * 32}
    assert record["parameters"] == {
        "prompt": "Löwe\0", "height": 256, "width": 256, "image": shown, "num_steps": 4, "strength": 0.75,
        "guidance": 7.5, "seed": 2**63 + 1,
    }  # fmt: skip
    assert set(record["options"]) == {"sampler", "reproducible"} | (
        set() if output_format == OutputFormat.PNG else {"output_format"}
    )
    assert msgspec.convert(record["receipt"], Receipt) == RECEIPT


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_the_same_request_gives_the_same_bytes(output_format: OutputFormat) -> None:
    """Whatever the job is called, and however its size and seed were found."""
    spec = spec_of()
    asked = msgspec.structs.replace(spec.parameters, seed=spec.seed, width=256, height=256)
    options = msgspec.structs.replace(spec.options, priority=5, deadline_seconds=9.0)
    again = msgspec.structs.replace(
        spec, id="0-2", account="umbrella", parameters=asked, options=options, trace={"a": "b"}
    )

    assert file_of(spec, output_format) == file_of(again, output_format)


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_it_changes_no_pixel(output_format: OutputFormat) -> None:
    image = image_of()
    plain = encode_picture(image.picture, output_format, 90)

    described = file_of(spec_of(), output_format)

    assert texts(plain) == ("", "")
    assert described != plain
    with Image.open(io.BytesIO(plain)) as one, Image.open(io.BytesIO(described)) as other:
        assert one.tobytes() == other.tobytes()


def test_a_user_comment_is_of_the_type_that_exif_asks_for() -> None:
    """Readers that go by the type, such as piexif, would otherwise not take it for text."""
    block = exif_block(describe(spec_of(), image_of()), MAX_JPEG_EXIF)

    assert struct.unpack_from(">HHH", block, len(b"Exif\0\0") + SECOND_AT) == (1, USER_COMMENT, UNDEFINED)


def test_prompts_too_long_for_a_jpeg_cost_the_picture_nothing() -> None:
    """First the text for web UIs is left out, then the record; WebP and PNG have room for both."""
    long, longer = spec_of(prompt="x" * 33_000), spec_of(prompt="x" * 66_000)

    short_of_text, empty = (texts(file_of(spec, OutputFormat.JPEG)) for spec in (long, longer))

    assert short_of_text[0] == ""
    assert json.loads(short_of_text[1])["parameters"]["prompt"] == "x" * 33_000
    assert empty == ("", "")
    for output_format in (OutputFormat.PNG, OutputFormat.WEBP):
        parameters, record = texts(file_of(longer, output_format))
        assert parsed(parameters)[0] == json.loads(record)["parameters"]["prompt"] == "x" * 66_000


def test_a_zero_character_ends_no_text() -> None:
    parameters, _ = texts(file_of(spec_of(prompt="a\0lion")))

    assert parsed(parameters)[0] == "a\N{REPLACEMENT CHARACTER}lion"

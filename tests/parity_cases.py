"""One table of requests, good and bad, that every front end must answer alike.

Pictures are written as ``bytes`` here and sent as each front end has them: an array of integers, a file, or bytes.
What a front end cannot even say is listed in ``cannot``, with the reason.
"""

import base64
import zlib
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
from PIL import Image

from tests.calls import encoded, picture

FRONT_ENDS: Final = ("cloudflare", "json", "form", "grpc")

NO_OPTIONS: Final = {"cloudflare": "the dialect has no options of ours"}
PROTO_TYPES: Final = {"grpc": "protobuf fields have types"}
PROTO_NAMES: Final = {"grpc": "protobuf has no unknown fields by name"}
PROTO_RANGE: Final = {"grpc": "protobuf integers have a range"}
FORM_TEXT: Final = {"form": "the parts of a form are text"}
FILES_ARE_BYTES: Final = {"form": "a file has only bytes", "grpc": "a bytes field has only bytes"}
AN_INSTANT: Final = {"grpc": "a Timestamp is an instant"}
ROUTED: Final = "sd-1.5"
"""A model that the gateway has a route for."""
NO_NAN: Final = dict.fromkeys(("cloudflare", "json", "form"), "JSON has no NaN")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A request; ``code`` and ``field`` are those of its error, None for a job that shows ``shown``."""

    name: str
    fields: dict[str, Any] = {}
    options: dict[str, Any] | None = None
    code: str | None = None
    field: str | None = None
    shown: dict[str, Any] = {}
    warning: str | None = None
    cannot: dict[str, str] = {}


def good(
    name: str, cannot: dict[str, str] | None = None, shown: dict[str, Any] | None = None, warning: str | None = None,
    **fields: Any,
) -> Case:  # fmt: skip
    fields = {"prompt": "a lion"} | fields
    plain = {key: value for key, value in fields.items() if not key.startswith(("image", "mask"))}
    return Case(name=name, fields=fields, shown=plain | (shown or {}), warning=warning, cannot=cannot or {})


def bad(
    name: str, field: str, cannot: dict[str, str] | None = None, code: str = "invalid_request", **fields: Any
) -> Case:
    return Case(name=name, fields={"prompt": "a lion"} | fields, code=code, field=field, cannot=cannot or {})


def option(
    name: str, code: str | None = None, field: str | None = None, cannot: dict[str, str] | None = None, **options: Any
) -> Case:
    return Case(
        name=f"option {name}",
        fields={"prompt": "a lion"},
        options=options,
        code=code,
        field=None if field is None else f"options.{field}".rstrip("."),
        cannot=NO_OPTIONS | (cannot or {}),
    )


@cache
def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def animation() -> bytes:
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 128, 255)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def huge_header() -> bytes:
    """A PNG that says it has 100,000 x 100,000 pixels."""
    data = bytearray(picture())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def turned() -> bytes:
    """A photo that was taken with the camera on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(64, 48, "JPEG", exif=exif)


def write_pools(path: Path, *models: str) -> str:
    """A pools file in which the worker of the queue ``default`` makes everything, whichever of ``models`` is named."""
    routes = ['pools = ["default"]\n', *(f'pools = ["default"]\nmodel = "{model}"\n' for model in models)]
    path.write_text(
        "".join(['[[pools]]\nname = "default"\nengine = "fake"\n', *("[[routes]]\n" + it for it in routes)])
    )
    return str(path)


def ahead(**time: float) -> str:
    """A time in the future, as RFC 3339 writes it."""
    return (datetime.now(UTC) + timedelta(**time)).strftime("%Y-%m-%dT%H:%M:%SZ")


PNG: Final = picture()
INFO: Final = {"format": "PNG", "width": 64, "height": 48, "bytes": len(PNG), "sha256": sha256(PNG).hexdigest()}
TURNED: Final = turned()
UPRIGHT: Final = {
    "format": "JPEG",
    "width": 48,
    "height": 64,
    "bytes": len(TURNED),
    "sha256": sha256(TURNED).hexdigest(),
}
MASK: Final = encoded(Image.new("L", (64, 48), 255))

JOBS: Final = (
    good("prompt alone", shown={"num_steps": 20, "strength": 1, "guidance": 7.5, "seed": None, "image": None}),
    good("text beyond ASCII", prompt="Löwe 🦁\n\t„groß“"),
    good("text that looks like JSON", prompt="null", negative_prompt="3"),
    good("text that looks like an object", prompt='{"prompt": "x"}'),
    good("longest prompt", prompt="x" * 16_384),
    good("empty negative prompt", negative_prompt=""),
    good("smallest size", width=256, height=256),
    good("widest size", width=2048, height=256),
    good("width alone", width=512, shown={"height": None}),
    good("height alone", height=264, shown={"width": None}),
    good("odd width", width=513, shown={"width": 512}, warning="width 513 was rounded to 512"),
    good("odd height", height=260, shown={"height": 264}, warning="height 260 was rounded to 264"),
    good("one step", num_steps=1),
    good("most steps", num_steps=20),
    good("no strength, no picture", strength=0),
    good("full strength", strength=1),
    good("strength as a fraction", strength=0.3),
    good("least strength with a picture", strength=0.05, image=PNG),
    good("no guidance", guidance=0),
    good("whole guidance", guidance=7),
    good("most guidance", guidance=50),
    good("seed 0", seed=0),
    good("seed beyond doubles", seed=2**53 + 1),
    good("largest seed", seed=2**64 - 1),
    good("image as PNG", image=PNG, shown={"image": INFO}),
    good("image as JPEG", image=picture(form="JPEG")),
    good("image as WebP", image=picture(form="WEBP")),
    good("image as GIF", image=picture(form="GIF")),
    good("image as BMP", image=picture(form="BMP")),
    good("grey image", image=picture(mode="L")),
    good("transparent image", image=picture(mode="RGBA")),
    good("palette image", image=picture(mode="P")),
    good("16-bit image", image=encoded(Image.new("I;16", (64, 48), 40_000))),
    good("one-pixel image", image=picture(1, 1)),
    good("turned image", image=TURNED, shown={"image": UPRIGHT}),
    good("image in base64", image_b64=base64_of(PNG), shown={"image": INFO}),
    good("image as data URL", image_b64=f"data:image/png;base64,{base64_of(PNG)}", shown={"image": INFO}),
    good("base64 without padding", image_b64=base64_of(PNG).rstrip("="), shown={"image": INFO}),
    good("base64 for URLs", image_b64=base64.urlsafe_b64encode(PNG).decode(), shown={"image": INFO}),
    good("base64 in lines", image_b64=base64.encodebytes(PNG).decode(), shown={"image": INFO}),
    good("image and mask", image=PNG, mask=MASK, shown={"image": INFO}),
    good("mask of another size", image=PNG, mask=picture(8, 8), warning="mask 8x8 was resized"),
    good("base64 and mask", image_b64=base64_of(PNG), mask=MASK),
    good(
        "everything", negative_prompt="dull", height=512, width=256, image=PNG, mask=MASK, num_steps=4,
        strength=0.75, guidance=2.5, seed=11,
    ),
    good("integers as decimals", PROTO_TYPES, num_steps=20.0, width=512.0, seed=1.0),
    good("unknown field", PROTO_NAMES, num_step=3, shown={"num_step": ...}, warning="unknown field 'num_step'"),
    option("priority", priority=-10),
    option("sampler", sampler="euler_a"),
    option("format and quality", output_format="webp", output_quality=1),
    option("deadline", deadline_seconds=3600.5),
    option("whole deadline", deadline_seconds=60),
    option("reject if busy", reject_if_busy=True),
    option("reproducible", reproducible=True),
    option("previews", previews=True),
    option("model", model=ROUTED),
    option("not before a time long past", not_before="2020-01-01T00:00:00.250000Z"),
    option("not before next week", not_before=ahead(days=7)),
    option("not before, but by a deadline", not_before=ahead(hours=1), deadline_seconds=7200),
    option("none"),
)  # fmt: skip

ERRORS: Final = (
    Case(name="nothing", code="invalid_request", field="prompt"),
    Case(name="no prompt", fields={"seed": 1}, code="invalid_request", field="prompt"),
    bad("empty prompt", "prompt", prompt=""),
    bad("prompt too long", "prompt", prompt="x" * 16_385),
    bad("prompt too long in bytes", "prompt", prompt="ß" * 8193),
    bad("prompt a number", "prompt", FORM_TEXT | PROTO_TYPES, prompt=1),
    bad("prompt null", "prompt", FORM_TEXT | {"grpc": "an absent field is just that"}, prompt=None),
    bad("prompt a list", "prompt", FORM_TEXT | PROTO_TYPES, prompt=["a lion"]),
    bad("negative prompt too long", "negative_prompt", negative_prompt="x" * 16_385),
    bad("width too small", "width", width=255),
    bad("width too large", "width", width=2049),
    bad("width below zero", "width", width=-512),
    bad("width a fraction", "width", PROTO_TYPES, width=512.5),
    bad("width text", "width", PROTO_TYPES, width="wide"),
    bad("height too small", "height", height=0),
    bad("height too large", "height", height=4096),
    bad("no steps", "num_steps", num_steps=0),
    bad("steps below zero", "num_steps", num_steps=-3),
    bad("too many steps", "num_steps", num_steps=21),
    bad("half a step", "num_steps", PROTO_TYPES, num_steps=2.5),
    bad("steps true", "num_steps", {"grpc": "its Python stubs take true as 1"}, num_steps=True),
    bad("too many steps for protobuf", "num_steps", PROTO_RANGE, num_steps=2**31),
    bad("strength above one", "strength", strength=1.01),
    bad("strength below zero", "strength", strength=-0.01),
    bad("strength not a number", "strength", NO_NAN, strength=float("nan")),
    bad("guidance below zero", "guidance", guidance=-0.5),
    bad("guidance above fifty", "guidance", guidance=50.5),
    bad("guidance beyond measure", "guidance", guidance=1e308),
    bad("guidance null", "guidance", {"grpc": "an absent field is just that"}, guidance=None),
    bad("guidance infinite", "guidance", NO_NAN, guidance=float("inf")),
    bad("seed below zero", "seed", PROTO_RANGE, seed=-1),
    bad("seed beyond 64 bits", "seed", PROTO_RANGE, seed=2**64),
    bad("seed a fraction", "seed", PROTO_TYPES, seed=0.5),
    bad("image empty", "image", code="invalid_image", image=b""),
    bad("image no picture", "image", code="invalid_image", image=b"a lion"),
    bad("image SVG", "image", code="invalid_image", image=b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    bad("image TIFF", "image", code="invalid_image", image=picture(form="TIFF")),
    bad("image cut in its header", "image", code="invalid_image", image=PNG[:20]),
    bad("image animated", "image", code="invalid_image", image=animation()),
    bad("image a bomb", "image", code="invalid_image", image=huge_header()),
    bad("image too wide", "image", code="invalid_image", image=encoded(Image.new("1", (4097, 1)))),
    bad("image items above 255", "image", FILES_ARE_BYTES, image=[256]),
    bad("image items below zero", "image", FILES_ARE_BYTES, image=[1, -1]),
    bad("image items fractions", "image", FILES_ARE_BYTES, image=[1.5]),
    bad("image items text", "image", FILES_ARE_BYTES, image=["a"]),
    bad("image items true", "image", FILES_ARE_BYTES, image=[True]),
    bad("image text", "image", FILES_ARE_BYTES, image="abc"),
    bad("base64 garbage", "image_b64", image_b64="!!!"),
    bad("base64 empty", "image", code="invalid_image", image_b64=""),
    bad("base64 of no picture", "image", code="invalid_image", image_b64=base64_of(b"a lion")),
    bad("base64 a list", "image_b64", FORM_TEXT | PROTO_TYPES, image_b64=[1]),
    bad("image twice", "image_b64", image=PNG, image_b64=base64_of(PNG)),
    bad("mask without image", "mask", mask=MASK),
    bad("mask empty", "mask", code="invalid_image", image=PNG, mask=b""),
    bad("mask no picture", "mask", code="invalid_image", image=PNG, mask=b"white"),
    bad("mask animated", "mask", code="invalid_image", image=PNG, mask=animation()),
    bad("less than one step", "strength", image=PNG, num_steps=10, strength=0.05),
    bad("no strength with a picture", "strength", image=PNG, strength=0),
    bad("the schema's order", "width", num_steps=30, width=1),
    bad("prompt before all", "prompt", prompt="", width=1, num_steps=30),
    bad("schema before our rules", "num_steps", num_steps=30, mask=MASK, strength=7),
    bad("our rules in their order", "mask", mask=MASK, num_steps=0, guidance=99),
    Case(
        name="fields before options",
        fields={"prompt": "a lion", "num_steps": 0},
        options={"priority": 11},
        code="invalid_request",
        field="num_steps",
        cannot=NO_OPTIONS,
    ),
    option("priority too high", "invalid_request", "priority", priority=11),
    option("priority too low", "invalid_request", "priority", priority=-11),
    option("priority text", "invalid_request", "priority", PROTO_TYPES, priority="high"),
    option("quality 0", "invalid_request", "output_quality", output_quality=0),
    option("quality 101", "invalid_request", "output_quality", output_quality=101),
    option("deadline now", "invalid_request", "deadline_seconds", deadline_seconds=0),
    option("deadline past", "invalid_request", "deadline_seconds", deadline_seconds=-1),
    option("deadline far", "invalid_request", "deadline_seconds", deadline_seconds=1e9),
    option("not before a naive time", "invalid_request", "not_before", AN_INSTANT, not_before="2030-01-01T00:00:00"),
    option("not before a word", "invalid_request", "not_before", AN_INSTANT, not_before="tomorrow"),
    option("not before 2100", "invalid_request", "not_before", not_before="2100-01-01T00:00:00Z"),
    option("not before its deadline", "invalid_request", "not_before", not_before=ahead(hours=1), deadline_seconds=60),
    option("reproducible a number", "invalid_request", "reproducible", PROTO_TYPES, reproducible=1),
    option("previews text", "invalid_request", "previews", PROTO_TYPES, previews="small"),
    option("model empty", "invalid_request", "model", model=""),
    option("model with a space", "invalid_request", "model", model="sd 1.5"),
    option("model beyond ASCII", "invalid_request", "model", model="süß"),
    option("model after a slash", "invalid_request", "model", model="/sd-1.5"),
    option("model too long", "invalid_request", "model", model="m" * 129),
    option("model a number", "invalid_request", "model", PROTO_TYPES, model=1.5),
    option("unknown sampler", "invalid_request", "sampler", {"grpc": "an enum has no unknown names"}, sampler="magic"),
    option("unknown", "invalid_request", "", PROTO_NAMES, priorty=1),
)

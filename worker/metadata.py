"""What a picture's file says about itself: what was asked for, the seed, and the receipt.

Twice: as Stable Diffusion web UIs write and read it, and as JSON with everything. The same request gives the same
bytes: nothing here depends on the time, the job or the worker.
"""

import json
import struct
from typing import Final

import msgspec
from PIL import PngImagePlugin

from img2img.jobs import JobSpec
from img2img.requests import JobOptions, Sampler
from worker.engines.base import Image

PARAMETERS_KEY: Final = "parameters"
"""The key under which web UIs look in a PNG."""
RECORD_KEY: Final = "img2img"
HASH_DIGITS: Final = 10
SAMPLER_NAMES: Final[dict[str, str]] = {
    Sampler.DPMPP_2M: "DPM++ 2M",
    Sampler.DDIM: "DDIM",
    Sampler.EULER: "Euler",
    Sampler.EULER_A: "Euler a",
}
QUOTED: Final = frozenset(",:\n")

# EXIF, as TIFF has it: tags, types, and where the two directories and their values lie.
IMAGE_DESCRIPTION: Final = 0x010E
EXIF_DIRECTORY: Final = 0x8769
USER_COMMENT: Final = 0x9286
ASCII: Final = 2
LONG: Final = 4
UNDEFINED: Final = 7
FIRST_AT: Final = 8
SECOND_AT: Final = FIRST_AT + 2 + 2 * 12 + 4
VALUES_AT: Final = SECOND_AT + 2 + 12 + 4


class Metadata(msgspec.Struct, frozen=True):
    """``parameters`` in the words of web UIs, ``record`` as JSON in ASCII."""

    parameters: str
    record: str


def describe(spec: JobSpec, image: Image) -> Metadata:
    """The metadata of a job's finished picture."""
    return Metadata(_parameters(spec, image), _record(spec, image))


def png_chunks(metadata: Metadata) -> PngImagePlugin.PngInfo:
    """Text chunks ``parameters`` and ``img2img``."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PARAMETERS_KEY, metadata.parameters)
    chunks.add_itxt(RECORD_KEY, metadata.record)
    return chunks


def exif_block(metadata: Metadata, limit: int) -> bytes:
    """EXIF whose UserComment holds the parameters and whose ImageDescription the record.

    What would be longer than ``limit`` bytes is left out: first the parameters, which the record has, too, then all.
    """
    whole = (_exif(metadata.record, text) for text in (metadata.parameters, ""))
    return next((block for block in whole if len(block) <= limit), b"")


def _parameters(spec: JobSpec, image: Image) -> str:
    asked, receipt = spec.parameters, image.receipt
    sampler = spec.options.sampler if receipt is None else receipt.sampler
    values = {
        "Steps": asked.num_steps,
        "Sampler": SAMPLER_NAMES.get(sampler, sampler) if sampler else None,
        "CFG scale": f"{asked.guidance:g}",
        "Seed": spec.seed,
        "Size": f"{image.picture.width}x{image.picture.height}",
        "Model hash": receipt.revision[:HASH_DIGITS] if receipt and receipt.revision else None,
        "Model": None if receipt is None else receipt.model,
        "Denoising strength": None if asked.image is None else f"{asked.strength:g}",
    }
    lines = [asked.prompt]
    if asked.negative_prompt:
        lines.append(f"Negative prompt: {asked.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines).replace("\0", "\N{REPLACEMENT CHARACTER}")  # which would end the text


def _quoted(value: str) -> str:
    """As web UIs do with what would be taken for the end of the value."""
    return json.dumps(value, ensure_ascii=False) if QUOTED & set(value) else value


def _record(spec: JobSpec, image: Image) -> str:
    """What makes the picture again: size and seed as they were used, not as they were asked for."""
    options = spec.options
    used = msgspec.structs.replace(
        spec.parameters, seed=spec.seed, width=image.picture.width, height=image.picture.height
    )
    shaping = JobOptions(
        sampler=options.sampler,
        output_format=options.output_format,
        output_quality=options.output_quality,
        reproducible=options.reproducible,
    )
    parameters = {name: value for name, value in msgspec.to_builtins(used).items() if value is not None}
    record = {"parameters": parameters, "options": msgspec.to_builtins(shaping)}
    if image.receipt is not None:
        record["receipt"] = msgspec.to_builtins(image.receipt)
    return json.dumps(record, separators=(",", ":"))


def _exif(description: str, comment: str) -> bytes:
    """EXIF with two tags. Pillow would give UserComment a type with which its readers do not expect it."""
    first = description.encode("ascii") + b"\0"
    first += b"\0" * (len(first) % 2)
    second = b"UNICODE\0" + comment.encode("utf-16-be")
    return b"".join(
        (
            b"Exif\0\0MM\0*",
            struct.pack(">I", FIRST_AT),
            struct.pack(">H", 2),
            struct.pack(">HHII", IMAGE_DESCRIPTION, ASCII, len(first), VALUES_AT),
            struct.pack(">HHII", EXIF_DIRECTORY, LONG, 1, SECOND_AT),
            struct.pack(">I", 0),
            struct.pack(">H", 1),
            struct.pack(">HHII", USER_COMMENT, UNDEFINED, len(second), VALUES_AT + len(first)),
            struct.pack(">I", 0),
            first,
            second,
        )
    )

"""The one request model: what every front end builds and every worker gets.

``build_request`` takes the fields as a front end decoded them (JSON, multipart or protobuf) and applies the
seed's schema first, then the rules that Cloudflare's schema leaves out. Both raise the same errors
everywhere, because no front end checks anything itself.
"""

import base64
import contextlib
import hashlib
import math
import re
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec

from img2img.errors import InvalidRequest
from img2img.images import PictureInfo, PictureLimits, probe
from img2img.schema import INPUT_SCHEMA, validate
from img2img.sizes import SIZE_MULTIPLE

MAX_SEED: Final = 2**64 - 1
MODEL_NAME: Final = re.compile(r"[!-.0-~](?:[!-~]{0,126}[!-.0-~])?")
MODEL_NAME_RULE: Final = "1 to 128 visible ASCII characters, no '/' first or last"
"""A name is part of a URL in Cloudflare's dialect."""
MAX_GUIDANCE: Final = 50.0
MAX_NOTED: Final = 5
"""Unknown fields that are named in warnings; the others are counted."""
MAX_NAME: Final = 40
"""Characters of an unknown name that are repeated to its sender."""
KNOWN_FIELDS: Final = frozenset(INPUT_SCHEMA["properties"]) | {"options", "external_reference"}


class Sampler(StrEnum):
    DPMPP_2M = "dpmpp_2m"
    DDIM = "ddim"
    EULER = "euler"
    EULER_A = "euler_a"


class OutputFormat(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


class Img2ImgRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The seed's fields with decoded values; ``image_b64`` is only another spelling of ``image``.

    ``image`` and ``mask`` are encoded files (PNG, JPEG, WebP, GIF, BMP), sizes are pixels, ``strength`` is
    0..1 and ``guidance`` 0..50.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    image: bytes | None = None
    mask: bytes | None = None
    num_steps: int = 20
    strength: float = 1.0
    guidance: float = 7.5
    seed: int | None = None


class JobOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the seed's schema does not have; the same on the native API and gRPC.

    ``model`` is a name that the pools file has routes for; None leaves the choice to the service.
    """

    priority: int = 0
    deadline_seconds: float | None = None
    sampler: Sampler | None = None
    output_format: OutputFormat = OutputFormat.PNG
    output_quality: int = 90
    reject_if_busy: bool = False
    not_before: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    reproducible: bool = False
    previews: bool = False
    model: str | None = None


OPTION_FORMS: Final = {
    "priority": "an integer from -10 to 10",
    "deadline_seconds": "a number of seconds",
    "sampler": f"one of {', '.join(Sampler)}",
    "output_format": f"one of {', '.join(OutputFormat)}",
    "output_quality": "an integer from 1 to 100",
    "reject_if_busy": "true or false",
    "not_before": "a time with its offset, such as 2030-01-31T12:00:00Z",
    "reproducible": "true or false",
    "previews": "true or false",
    "model": "the name of a model",
}
"""What each option must be, for whoever wrote something else."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """An ``Img2ImgRequest`` as it is recorded and shown: descriptions in place of the bytes."""

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    image: PictureInfo | None = None
    mask: PictureInfo | None = None
    num_steps: int = 20
    strength: float = 1.0
    guidance: float = 7.5
    seed: int | None = None

    @property
    def steps(self) -> int:
        """Steps that the model takes: image to image runs the last ``num_steps * strength``."""
        return self.num_steps if self.image is None else max(1, int(self.num_steps * self.strength))


class Inputs(msgspec.Struct, frozen=True):
    """The encoded input files of a job, stored as one blob."""

    image: bytes | None = None
    mask: bytes | None = None


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that are settings, not part of the contract. Sizes in bytes, times in seconds."""

    prompt_bytes: int = 16 * 1024
    pictures: PictureLimits = PictureLimits()
    max_deadline: float = 24 * 3600.0
    max_defer: float = 30 * 24 * 3600.0


class CheckedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed every rule, ready to be submitted."""

    request: Img2ImgRequest
    options: JobOptions
    parameters: Parameters
    warnings: tuple[str, ...]

    @property
    def inputs(self) -> Inputs | None:
        if self.request.image is None:
            return None
        return Inputs(self.request.image, self.request.mask)

    def reproducibly(self) -> "CheckedRequest":
        """The same, as if it had asked for a reproducible job."""
        return msgspec.structs.replace(self, options=msgspec.structs.replace(self.options, reproducible=True))

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the result; equal requests have equal fingerprints.

        The pictures count by their own SHA-256, which the parameters hold.
        """
        return hashlib.sha256(msgspec.json.encode((self.parameters, self.options))).hexdigest()


def draw_seed() -> int:
    """A seed for a request without one; 32 bits, so that it survives JSON numbers anywhere."""
    return secrets.randbits(32)


def build_request(
    body: object, options: object = None, limits: RequestLimits | None = None, deadline: float | None = None
) -> CheckedRequest:
    """Check a decoded body and options; ``image`` and ``mask`` may be bytes or lists of integers.

    ``deadline`` is the caller's own, in seconds from now, beside the one in the options.

    Raises:
        InvalidRequest: names the first field that is wrong and what to send instead.
    """
    limits = limits or RequestLimits()
    fields = validate(body)
    fields["image"], fields["mask"] = _picture_bytes(fields, "image"), _picture_bytes(fields, "mask")
    encoded = fields.pop("image_b64", None)
    if encoded is not None:
        if fields["image"] is not None:
            raise InvalidRequest("image_b64", "'/image' and '/image_b64' are both given: send one of them")
        fields["image"] = _decode_base64(encoded)
    request = Img2ImgRequest(**fields)
    _check_rules(request, limits)
    request, warnings = _round_size(request)
    warnings += _unknown_fields(body)
    image = None if request.image is None else probe("image", request.image, limits.pictures)
    mask = None if request.mask is None else probe("mask", request.mask, limits.pictures)
    if image and mask and (image.width, image.height) != (mask.width, mask.height):
        warnings.append(f"mask {mask.width}x{mask.height} was resized to the image's {image.width}x{image.height}")
    return CheckedRequest(
        request=request,
        options=build_options(options, limits, deadline),
        parameters=_parameters(request, image, mask),
        warnings=tuple(warnings),
    )


def build_options(options: object, limits: RequestLimits, deadline: float | None = None) -> JobOptions:
    """Check ``options``; unknown names are refused, so that a misspelt option is never ignored.

    Raises:
        InvalidRequest: with ``options.<name>`` as its field.
    """
    built = JobOptions() if options is None else _options_of_their_types(options)
    if not -10 <= built.priority <= 10:
        raise InvalidRequest("options.priority", "'/options/priority' must be between -10 and 10")
    if not 1 <= built.output_quality <= 100:
        raise InvalidRequest("options.output_quality", "'/options/output_quality' must be between 1 and 100")
    if built.model is not None and not MODEL_NAME.fullmatch(built.model):
        raise InvalidRequest(
            "options.model", f"'/options/model' must have {MODEL_NAME_RULE}: name a model, or leave it out"
        )
    seconds = built.deadline_seconds
    if seconds is not None and not 0 < seconds <= limits.max_deadline:
        raise InvalidRequest(
            "options.deadline_seconds",
            f"'/options/deadline_seconds' must be above 0 and at most {limits.max_deadline:g}",
        )
    return msgspec.structs.replace(built, not_before=_start(built, limits, deadline))


def _options_of_their_types(options: object) -> JobOptions:
    if not isinstance(options, Mapping):
        raise InvalidRequest("options", "'/options' must be an object")
    unknown = next((str(name) for name in options if name not in OPTION_FORMS), None)
    if unknown is not None:
        raise InvalidRequest(
            "options",
            f"'/options' has no {unknown[:MAX_NAME]!r}: write one of {', '.join(OPTION_FORMS)}",
        )
    try:
        return msgspec.convert(options, JobOptions)
    except msgspec.ValidationError as exc:
        name = str(exc).partition(" - at `$.")[2].rstrip("`")
        raise InvalidRequest(f"options.{name}", f"'/options/{name}' must be {OPTION_FORMS[name]}") from exc


def _start(options: JobOptions, limits: RequestLimits, deadline: float | None) -> datetime | None:
    """``not_before`` in UTC, so that one time has one spelling."""
    if options.not_before is None:
        return None
    try:
        start = options.not_before.astimezone(UTC)
    except OverflowError as exc:
        raise InvalidRequest("options.not_before", "'/options/not_before' must be a time that UTC has, too") from exc
    ahead = start.timestamp() - time.time()
    if ahead > limits.max_defer:
        raise InvalidRequest(
            "options.not_before", f"'/options/not_before' must be at most {limits.max_defer:.0f} seconds away"
        )
    if any(limit is not None and ahead >= limit for limit in (options.deadline_seconds, deadline)):
        raise InvalidRequest(
            "options.not_before", "'/options/not_before' must lie before the deadline: move one of the two"
        )
    return start


def _check_rules(request: Img2ImgRequest, limits: RequestLimits) -> None:
    """The rules that Cloudflare's schema leaves out, in the schema's property order."""
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text.encode("utf-8", "surrogatepass")) > limits.prompt_bytes:
            raise InvalidRequest(name, f"Length of '/{name}' must be <= {limits.prompt_bytes} bytes")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRequest(name, f"'/{name}' must be valid Unicode, without lone surrogates")
    if request.mask is not None and request.image is None:
        raise InvalidRequest("mask", "'/mask' needs '/image' or '/image_b64': send the picture that it masks")
    if request.num_steps < 1:
        raise InvalidRequest("num_steps", "'/num_steps' must be >= 1")
    if not 0 <= request.strength <= 1:
        raise InvalidRequest("strength", "'/strength' must be between 0 and 1")
    if not (math.isfinite(request.guidance) and 0 <= request.guidance <= MAX_GUIDANCE):
        raise InvalidRequest("guidance", f"'/guidance' must be between 0 and {MAX_GUIDANCE:g}")
    if request.image is not None and int(request.num_steps * request.strength) < 1:
        raise InvalidRequest("strength", "'/strength' times '/num_steps' must be at least one step: raise one of them")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise InvalidRequest("seed", "'/seed' must be between 0 and 18446744073709551615")


def _round_size(request: Img2ImgRequest) -> tuple[Img2ImgRequest, list[str]]:
    """Round width and height to the multiple of 8 that the latent needs, and say so."""
    rounded: dict[str, int] = {}
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is not None and value % SIZE_MULTIPLE:
            rounded[name] = (value + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE
    warnings = [
        f"{name} {getattr(request, name)} was rounded to {value}, a multiple of {SIZE_MULTIPLE}"
        for name, value in rounded.items()
    ]
    return msgspec.structs.replace(request, **rounded), warnings


def _unknown_fields(body: object) -> list[str]:
    """Cloudflare ignores what its schema does not name, and so do we; a misspelt name should show all the same."""
    unknown = [str(name) for name in body if name not in KNOWN_FIELDS] if isinstance(body, Mapping) else []
    warnings = [f"unknown field {name[:MAX_NAME]!r} was ignored" for name in unknown[:MAX_NOTED]]
    if len(unknown) > MAX_NOTED:
        warnings.append(f"{len(unknown) - MAX_NOTED} more unknown fields were ignored")
    return warnings


def _parameters(request: Img2ImgRequest, image: PictureInfo | None, mask: PictureInfo | None) -> Parameters:
    fields = msgspec.structs.asdict(request) | {"image": image, "mask": mask}
    return Parameters(**fields)


def _picture_bytes(fields: Mapping[str, Any], name: str) -> bytes | None:
    value = fields.get(name)
    return integer_bytes(name, value) if isinstance(value, list) else value


def integer_bytes(name: str, items: list[Any], first: int = 0) -> bytes:
    """The bytes whose integers 0..255 are ``items`` (20.0 counts); ``first`` is the index of the first one.

    Raises:
        InvalidRequest: names the first item that is something else, such as 256, -1, "a", 1.5 or true.
    """
    if set(map(type, items)) <= {int, float}:
        with contextlib.suppress(ValueError, OverflowError):
            whole = bytes(map(int, items))
            if list(whole) == items:
                return whole
    bad = next(index for index, item in enumerate(items, first) if not _is_byte(item))
    raise InvalidRequest(name, f"'/{name}/{bad}' must be an integer between 0 and 255")


def _is_byte(item: object) -> bool:
    # type(), because True is an int to isinstance and no number in JSON.
    return type(item) in (int, float) and 0 <= item <= 255 and item == int(item)  # type: ignore[call-overload,operator]


def _decode_base64(text: str) -> bytes:
    """Decode standard or URL-safe base64, with or without padding, line breaks or a ``data:`` prefix."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True)  # what nearly everybody sends, in half the time
    compact = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError as exc:
        raise InvalidRequest("image_b64", f"'/image_b64' is not base64: {exc}") from exc

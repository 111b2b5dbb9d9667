"""``multipart/form-data`` bodies to the same fields as JSON: files are pictures, text is read by the schema."""

import asyncio
import io
from typing import Any, Final

import msgspec
from multipart import MultipartError, MultipartParser, parse_options_header

from gateway.rest.bodies import MAX_REST_BYTES
from img2img.errors import MalformedBody, RequestTooLarge
from img2img.schema import INPUT_SCHEMA

PICTURES: Final = frozenset({"image", "mask"})
NUMBERS: Final = frozenset(
    name for name, rule in INPUT_SCHEMA["properties"].items() if rule["type"] in ("integer", "number")
)
OPTION_PREFIX: Final = "options."
TEXT_OPTIONS: Final = frozenset({"model"})
"""Options that are text even where it looks like JSON, such as a model named ``1.5``."""
THREAD_ABOVE: Final = 256 * 1024


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


async def decode_form(raw: bytes, content_type: str) -> dict[str, object]:
    """Fields of a form; ``options`` is a JSON object, or one part per option named ``options.<name>``.

    Raises:
        MalformedBody: no boundary, or parts that cannot be told apart.
        RequestTooLarge: too much beside the pictures.
    """
    boundary = parse_options_header(content_type)[1].get("boundary")
    if not boundary:
        raise MalformedBody("The Content-Type has no boundary: let your HTTP library write it")
    if len(raw) > THREAD_ABOVE:
        return await asyncio.to_thread(_decode, raw, boundary)
    return _decode(raw, boundary)


def _decode(raw: bytes, boundary: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    options: dict[str, object] = {}
    size, rest = len(raw) + 1, 0
    try:
        for part in MultipartParser(io.BytesIO(raw), boundary, spool_limit=size, memory_limit=size):
            name = part.name
            if name in PICTURES:
                fields[name] = part.raw
                continue
            rest += 0 if name == "image_b64" else part.size
            if rest > MAX_REST_BYTES:
                raise RequestTooLarge(
                    f"Beside 'image', 'image_b64' and 'mask' a form may have {MAX_REST_BYTES} bytes: shorten the others"
                )
            # UTF-8 whatever the part's own charset says: some of Python's codecs take quadratic time.
            text = part.raw.decode()
            if name in NUMBERS or name == "options":
                fields[name] = _scalar(text)
            elif name.startswith(OPTION_PREFIX):
                option = name.removeprefix(OPTION_PREFIX)
                options[option] = text if option in TEXT_OPTIONS else _scalar(text)
            else:
                fields[name] = text
    except (MultipartError, UnicodeDecodeError) as exc:
        raise MalformedBody(f"The form cannot be read ({exc}): send multipart/form-data in UTF-8") from exc
    if options:
        given = fields.get("options")
        fields["options"] = {**given, **options} if isinstance(given, dict) else options
    return fields


def _scalar(text: str) -> Any:
    """JSON where it is JSON (numbers, true, an object), the text itself otherwise."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text

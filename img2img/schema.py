"""Validation against ``input.schema.json``, worded like Cloudflare's own validator.

Cloudflare checks Workers AI input with its open-source validator "cabidela"; its order and wording are
kept here: properties in the schema's order, the first error only, ``required`` last. Where it is looser than
its schema says (an object passes as an array) this one is strict, in the same words.
"""

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from img2img.errors import InvalidRequest

MODEL: Final = "@cf/runwayml/stable-diffusion-v1-5-img2img"
"""Cloudflare's name of the model whose schema this is."""
INPUT_SCHEMA: Final[dict[str, Any]] = json.loads(
    resources.files("img2img").joinpath("input.schema.json").read_text("utf-8")
)


def json_types(value: object) -> tuple[str, ...]:
    """The JSON Schema types of ``value``, as Cloudflare names them in a mismatch (20.0 is an integer)."""
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case int():
            return ("number", "integer")
        case float():
            return ("number", "integer") if math.isfinite(value) and value.is_integer() else ("number",)
        case str():
            return ("string",)
        case bytes() | bytearray() | memoryview():
            return ("array", "binary")
        case list():
            plain = all(isinstance(item, int | float | str) and not isinstance(item, bool) for item in value)
            return ("array", "binary") if plain else ("array",)
        case _:
            return ("object",)


def validate(value: object, schema: Mapping[str, Any] = INPUT_SCHEMA) -> dict[str, Any]:
    """Check a decoded body; 20.0 comes back as an ``int`` where one is asked for, absent properties stay absent.

    Raises:
        InvalidRequest: the first property that breaks the schema, in Cloudflare's wording.
    """
    fields = value if isinstance(value, Mapping) else {}
    checked = {
        name: _property(f"/{name}", name, fields[name], rule)
        for name, rule in schema["properties"].items()
        if name in fields
    }
    if missing := [name for name in schema["required"] if name not in checked]:
        raise InvalidRequest(missing[0], f"required properties at '/' are '{','.join(schema['required'])}'")
    return checked


def _property(path: str, name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    types = json_types(value)
    if rule["type"] not in types:
        found = ",".join(f"'{kind}'" for kind in types)
        raise InvalidRequest(name, f"Type mismatch of '{path}', '{rule['type']}' not in {found}")
    if rule["type"] == "string" and len(value) < rule.get("minLength", 0):
        raise InvalidRequest(name, f"Length of '{path}' must be >= {rule['minLength']} not met")
    if rule["type"] in ("integer", "number"):
        if value < rule.get("minimum", -math.inf):
            raise InvalidRequest(name, f"'{path}' must be >= {rule['minimum']}")
        if value > rule.get("maximum", math.inf):
            raise InvalidRequest(name, f"'{path}' must be <= {rule['maximum']}")
        return int(value) if rule["type"] == "integer" else _to_float(value)
    return value


def _to_float(value: float) -> float:
    """One value for 1 and 1.0, and for -0.0 and 0.0, which are equal; what no float can hold is infinite."""
    try:
        return float(value) + 0.0
    except OverflowError:
        return math.inf if value > 0 else -math.inf

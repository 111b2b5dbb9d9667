"""The OpenAPI description of routes that read their raw body, written by hand from the same schema file."""

from dataclasses import dataclass, field
from typing import Any, Final

from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
    SecurityScheme,
)

from img2img.requests import MAX_GUIDANCE, MAX_SEED, OutputFormat, Sampler
from img2img.schema import INPUT_SCHEMA

BINARY: Final = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
STRICTER: Final[dict[str, dict[str, Any]]] = {
    "num_steps": {"minimum": 1},
    "strength": {"minimum": 0, "maximum": 1},
    "guidance": {"minimum": 0, "maximum": MAX_GUIDANCE},
    "seed": {"minimum": 0, "maximum": MAX_SEED},
}
OPTIONS: Final = Schema(
    type=OpenAPIType.OBJECT,
    description="What Cloudflare's schema does not have; unknown names are refused.",
    properties={
        "priority": Schema(type=OpenAPIType.INTEGER, minimum=-10, maximum=10, default=0),
        "deadline_seconds": Schema(type=OpenAPIType.NUMBER, exclusive_minimum=0),
        "sampler": Schema(type=OpenAPIType.STRING, enum=[item.value for item in Sampler]),
        "output_format": Schema(type=OpenAPIType.STRING, enum=[item.value for item in OutputFormat], default="png"),
        "output_quality": Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=100, default=90),
        "reject_if_busy": Schema(type=OpenAPIType.BOOLEAN, default=False),
    },
)


def input_schema(*, pictures: Schema | None = None) -> dict[str, Schema]:
    """The seed's properties as OpenAPI schemas; ``pictures`` replaces the integer arrays."""
    schemas: dict[str, Schema] = {}
    for name, rule in INPUT_SCHEMA["properties"].items():
        if rule["type"] == "array" and pictures is not None:
            schemas[name] = pictures
            continue
        rule = rule | STRICTER.get(name, {})
        schemas[name] = Schema(
            type=OpenAPIType(rule["type"]),
            description=rule["description"],
            default=rule.get("default"),
            minimum=rule.get("minimum"),
            maximum=rule.get("maximum"),
            min_length=rule.get("minLength"),
            items=Schema(type=OpenAPIType.INTEGER, minimum=0, maximum=255) if rule["type"] == "array" else None,
        )
    return schemas


def _body(properties: dict[str, Schema]) -> OpenAPIMediaType:
    return OpenAPIMediaType(
        schema=Schema(type=OpenAPIType.OBJECT, properties=dict(properties), required=INPUT_SCHEMA["required"])
    )


@dataclass
class CreateJobOperation(Operation):
    """``POST /v1/jobs``."""

    request_body: RequestBody | None = field(
        default_factory=lambda: RequestBody(
            required=True,
            content={
                "application/json": _body(input_schema() | {"options": OPTIONS}),
                "multipart/form-data": _body(input_schema(pictures=BINARY) | {"options": OPTIONS}),
            },
        )
    )


@dataclass
class RunModelOperation(Operation):
    """Cloudflare's ``POST …/ai/run/{model}``; any Content-Type, always JSON."""

    request_body: RequestBody | None = field(
        default_factory=lambda: RequestBody(required=True, content={"application/json": _body(input_schema())})
    )


def openapi_config(version: str) -> OpenAPIConfig:
    return OpenAPIConfig(
        title="img2img",
        version=version,
        summary="Image-to-image jobs, natively and in Cloudflare Workers AI's dialect",
        path="/schema",
        use_handler_docstrings=True,
        render_plugins=[
            JsonRenderPlugin(path=["/", "/openapi.json"]),
            YamlRenderPlugin(path=["/openapi.yaml"]),
            SwaggerRenderPlugin(path=["/swagger"]),
        ],
        components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
        security=[{"key": []}],
    )

"""The OpenAPI description of what the handlers' signatures do not say: raw bodies, headers, errors.

Litestar builds an ``Operation`` from each handler; the classes here add to it after that.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import (
    Components,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    RequestBody,
    Schema,
    SecurityScheme,
)

from gateway.rest.envelope import Envelope
from gateway.rest.problems import PROBLEM_JSON, TITLES, Problem
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
        "not_before": Schema(
            type=OpenAPIType.STRING,
            format=OpenAPIFormat.DATE_TIME,
            description="The job starts no sooner; without a deadline of its own its time counts from then.",
        ),
        "reproducible": Schema(
            type=OpenAPIType.BOOLEAN,
            default=False,
            description="The same request makes the same bytes again, on the same kind of device and versions.",
        ),
        "previews": Schema(
            type=OpenAPIType.BOOLEAN, default=False, description="Send small pictures as `preview` events meanwhile."
        ),
        "model": Schema(
            type=OpenAPIType.STRING,
            min_length=1,
            max_length=128,
            description="A model that the service has routes for; without it the service's choice.",
        ),
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


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return Schema(type=OpenAPIType.OBJECT, properties=dict(properties), required=required)


def _body(properties: dict[str, Schema]) -> OpenAPIMediaType:
    return OpenAPIMediaType(schema=_object(properties, INPUT_SCHEMA["required"]))


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """The errors that a native route answers with."""
    return {status: ResponseSpec(Problem, description=_title(status), media_type=PROBLEM_JSON) for status in statuses}


def envelopes(*statuses: int) -> dict[int, ResponseSpec]:
    """The errors that a route of Cloudflare's dialect answers with."""
    return {status: ResponseSpec(Envelope, description=_title(status)) for status in statuses}


def _title(status: int) -> str:
    return TITLES.get(status) or HTTPStatus(status).phrase


@dataclass
class CreateJobOperation(Operation):
    """``POST /v1/jobs``."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            required=True,
            content={
                "application/json": _body(input_schema() | {"options": OPTIONS}),
                "multipart/form-data": _body(input_schema(pictures=BINARY) | {"options": OPTIONS}),
            },
        )
        _add_headers(
            self,
            {
                "Idempotency-Key": "A retry with the same key and body gets the first job; 1 to 255 characters.",
                "Prefer": "`wait=N` waits up to N seconds for the job to end.",
                "Deadline": "Seconds, or the RFC 3339 time, until which the job must be done.",
            },
        )


@dataclass
class WatchOperation(Operation):
    """``GET /v1/jobs/{job_id}/events``."""

    def __post_init__(self) -> None:
        _add_headers(self, {"Last-Event-ID": "The number of the last event seen; wins over `after`."})


@dataclass
class ImageOperation(Operation):
    """``GET /v1/jobs/{job_id}/image``: the format is the job's."""

    def __post_init__(self) -> None:
        _answer_with(self, {item.media_type: OpenAPIMediaType(schema=BINARY) for item in OutputFormat})


@dataclass
class RunModelOperation(Operation):
    """Cloudflare's ``POST …/ai/run/{model}``; any Content-Type, always JSON."""

    def __post_init__(self) -> None:
        picture = _object(input_schema(), INPUT_SCHEMA["required"])
        batch = _object({"requests": Schema(type=OpenAPIType.ARRAY, items=picture, min_items=1)}, ["requests"])
        poll = _object({"request_id": Schema(type=OpenAPIType.STRING)}, ["request_id"])
        self.request_body = RequestBody(
            required=True, content={"application/json": OpenAPIMediaType(schema=Schema(any_of=[picture, batch, poll]))}
        )
        query = Parameter(
            name="queueRequest",
            param_in="query",
            schema=Schema(type=OpenAPIType.BOOLEAN, default=False),
            description="Take the body as a batch.",
        )
        self.parameters = [*(self.parameters or []), query]
        _add_headers(
            self,
            {
                "Idempotency-Key": "A retry with the same key and body gets the first job's picture.",
                "x-stainless-retry-count": "Above 0, the call joins the job of an earlier call with the same body.",
            },
        )
        batch_answer = OpenAPIMediaType(schema=Schema(type=OpenAPIType.OBJECT, description="A batch, or its state."))
        _answer_with(self, {"image/png": OpenAPIMediaType(schema=BINARY), "application/json": batch_answer})


@dataclass
class PublicOperation(Operation):
    """A route that needs no key."""

    def __post_init__(self) -> None:
        self.security = []


def _add_headers(operation: Operation, headers: dict[str, str]) -> None:
    text = Schema(type=OpenAPIType.STRING)
    added = [
        Parameter(name=name, param_in="header", schema=text, description=description)
        for name, description in headers.items()
    ]
    operation.parameters = [*(operation.parameters or []), *added]


def _answer_with(operation: Operation, content: dict[str, OpenAPIMediaType]) -> None:
    answer = (operation.responses or {})["200"]
    if isinstance(answer, OpenAPIResponse):
        answer.content = content


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

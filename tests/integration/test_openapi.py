"""/schema is valid OpenAPI 3.1, describes every route, and tells the truth about them."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from litestar.routes import HTTPRoute
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.rest.app import build_app
from gateway.rest.openapi import STRICTER
from gateway.tenants import Tenants
from img2img.requests import JobOptions
from img2img.schema import INPUT_SCHEMA
from img2img.settings import Settings
from tests.calls import picture, run_path
from tests.stack import Gateway, Stack

RUN = "/client/v4/accounts/{account_id}/ai/run/{model}"
PUBLIC = {"/health/live", "/health/ready"}
METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def client(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with Stack(valkey_url, tmp_path_factory.mktemp("stack")) as stack:
        gateway: Gateway = stack.gateway()
        stack.worker(concurrency="4")
        with gateway.client() as client:
            yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    answer = client.get("/schema")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``GET /v1/jobs`` and so on, to what the document says of it."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    """By the specification's own schema, and with unique operation ids."""
    assert document["openapi"].startswith("3.1")
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


@pytest.mark.parametrize("path", ["/schema/openapi.json", "/schema/openapi.yaml", "/schema/swagger"])
def test_it_comes_in_every_form(client: httpx.Client, path: str) -> None:
    """For programs as JSON and YAML, for people as a page."""
    assert client.get(path).status_code == 200


def test_every_route_is_described(document: dict[str, Any]) -> None:
    """Nothing is served that the document leaves out, but the metrics and the document itself."""
    nothing: Any = msgspec.UNSET  # only the routes are looked at
    app = build_app(nothing, Tenants.open_local(), Settings(), nothing, nothing, nothing)
    served = {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path_format)}"
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods - {"OPTIONS", "HEAD"}
        if not route.path.startswith(("/schema", "/metrics"))
    }
    assert served == set(operations(document))
    assert all(operation["summary"] and operation["description"] for operation in operations(document).values())


def test_every_route_asks_for_a_key_but_health(document: dict[str, Any]) -> None:
    """The document's security holds for all routes; health takes it back."""
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    for name, operation in operations(document).items():
        path = name.split()[1]
        assert operation.get("security") == ([] if path in PUBLIC else None), name
        assert ("401" in operation["responses"]) == (path not in PUBLIC), name


def test_errors_are_described_in_each_dialect(document: dict[str, Any]) -> None:
    """Problems on our routes, envelopes on Cloudflare's; never the framework's own form."""
    for name, operation in operations(document).items():
        for status, answer in operation["responses"].items():
            if int(status) < 400 or name.split()[1] in PUBLIC:
                continue
            form, schema = (
                ("application/json", "Envelope") if "/client/v4" in name else ("application/problem+json", "Problem")
            )
            assert answer["content"] == {form: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, name


def bodies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The properties of each body that carries a request."""
    create = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]
    run = document["paths"][RUN]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    return {
        "json": create["application/json"]["schema"],
        "form": create["multipart/form-data"]["schema"],
        "cloudflare": run[0],
        "batch": run[1]["properties"]["requests"]["items"],
    }


@pytest.mark.parametrize("body", ["json", "form", "cloudflare", "batch"])
@pytest.mark.parametrize("field", INPUT_SCHEMA["properties"])
def test_every_field_is_described_with_its_bounds(document: dict[str, Any], body: str, field: str) -> None:
    """The published schema's eleven fields, with the bounds that it leaves out; files in a form."""
    schema = bodies(document)[body]
    assert schema["required"] == INPUT_SCHEMA["required"]
    shown, rule = schema["properties"][field], INPUT_SCHEMA["properties"][field] | STRICTER.get(field, {})
    if rule["type"] == "array":
        item = {"type": "integer", "minimum": 0, "maximum": 255}
        assert shown == {"type": "string", "format": "binary"} if body == "form" else shown["items"] == item
        return
    names = ("type", "description", "default", "minimum", "maximum", "minLength")
    assert {name: shown[name] for name in names if name in shown} == {n: rule[n] for n in names if n in rule}


NUMBERS = {
    name: rule | STRICTER.get(name, {})
    for name, rule in INPUT_SCHEMA["properties"].items()
    if rule["type"] in ("integer", "number")
}


@pytest.mark.parametrize("field", NUMBERS)
def test_the_described_bounds_are_the_real_ones(client: httpx.Client, field: str) -> None:
    """Both ends are taken, what lies beyond them is not."""
    low, high = NUMBERS[field]["minimum"], NUMBERS[field]["maximum"]
    statuses = [
        client.post("/v1/jobs", json={"prompt": "x", field: value}).status_code
        for value in (low, high, low - 1, high + 1)
    ]
    assert statuses == [202, 202, 400, 400]


def test_every_option_is_described(document: dict[str, Any]) -> None:
    """Their names and defaults are those of the model."""
    for body in ("json", "form"):
        options = bodies(document)[body]["properties"]["options"]["properties"]
        assert set(options) == set(JobOptions.__struct_fields__)
        for name, option in options.items():
            assert option.get("default") == getattr(JobOptions(), name), name


def test_headers_are_described(document: dict[str, Any]) -> None:
    """The headers that change what a route does."""
    found = {
        name: {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "header"}
        for name, operation in operations(document).items()
    }
    assert {name: headers for name, headers in found.items() if headers} == {
        "POST /v1/jobs": {"Idempotency-Key", "Prefer", "Deadline"},
        "GET /v1/jobs/{job_id}/events": {"Last-Event-ID"},
        f"POST {RUN}": {"Idempotency-Key", "x-stainless-retry-count"},
    }


def test_answers_are_what_the_document_says(client: httpx.Client, document: dict[str, Any]) -> None:
    """Jobs, lists, problems and envelopes, as they really come, fit their schemas."""

    def fits(answer: httpx.Response, schema: str) -> None:
        whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
        jsonschema.Draft202012Validator(whole).validate(answer.json())

    body = {"prompt": "x", "image": list(picture()), "options": {"output_format": "webp", "priority": 1}}
    queued = client.post("/v1/jobs", json=body)
    done = client.post("/v1/jobs", json=body, headers={"prefer": "wait=60"})
    failed = client.post("/v1/jobs", json={"prompt": "fake:refuse"}, headers={"prefer": "wait=60"})
    assert (queued.status_code, done.json()["state"], failed.json()["state"]) == (202, "succeeded", "failed")
    replayed = client.post(failed.json()["links"]["replay"])
    for answer in (queued, done, failed, client.get(f"/v1/jobs/{done.json()['id']}"), replayed):
        fits(answer, "JobView")
    fits(client.get("/v1/jobs"), "JobList")
    fits(client.get("/v1/queue"), "QueueStats")
    fits(client.post("/v1/jobs", json={}), "Problem")
    fits(client.post(run_path(), json={}), "Envelope")
    content = document["paths"]["/v1/jobs/{job_id}/image"]["get"]["responses"]["200"]["content"]
    assert client.get(done.json()["links"]["image"]).headers["content-type"] in content

"""The schemas that rendered objects are held against; unknown fields are mistakes everywhere."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import kubernetes_validate
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from jsonschema import Draft202012Validator

KUBERNETES: Final = "1.37"
MODELS: Final = {
    "ScaledObject": keda.ScaledObject,
    "TriggerAuthentication": keda.TriggerAuthentication,
    "ServiceMonitor": prometheus.ServiceMonitor,
    "PodMonitor": prometheus.PodMonitor,
    "PrometheusRule": prometheus.PrometheusRule,
}
TEXT: Final = {"type": "string", "minLength": 1}
NAMES: Final = {"type": "object", "additionalProperties": {"type": "string"}}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}
PARENT: Final = _closed(("name",), group=TEXT, kind=TEXT, namespace=TEXT, name=TEXT, sectionName=TEXT, port=PORT)
BACKEND: Final = _closed(("name", "port"), name=TEXT, port=PORT)
DURATION: Final = {"type": "string", "pattern": r"^\d+(h|m|s|ms)$"}
PATH: Final = _closed(
    ("type", "value"), type={"enum": ["Exact", "PathPrefix"]}, value={"type": "string", "pattern": "^/"}
)
METADATA: Final = _closed(("name", "namespace"), name=TEXT, namespace=TEXT, labels=NAMES, annotations=NAMES)


def _route(kind: str, **more: Any) -> dict[str, Any]:
    rule = _closed(("backendRefs",), backendRefs=_list(BACKEND), **more)
    spec = _closed(("parentRefs", "rules"), parentRefs=_list(PARENT), hostnames=_list(TEXT), rules=_list(rule))
    names = {"apiVersion": {"const": "gateway.networking.k8s.io/v1"}, "kind": {"const": kind}}
    return _closed(("apiVersion", "kind", "metadata", "spec"), metadata=METADATA, spec=spec, **names)


# No package for Python has the Gateway API's schemas: these are the fields of v1 that the chart writes, by hand.
ROUTES: Final = {
    "HTTPRoute": _route("HTTPRoute", timeouts=_closed(request=DURATION), matches=_list(_closed(("path",), path=PATH))),
    "GRPCRoute": _route("GRPCRoute"),
}


def mistakes(item: dict[str, Any]) -> list[str]:
    """What is wrong with an object, each as kind, path and reason."""
    kind = item["kind"]
    if kind in MODELS or kind in ROUTES:
        return [
            f"{kind} {'.'.join(map(str, error.absolute_path))}: {error.message}"
            for error in _validator(kind).iter_errors(item)
        ]
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as exc:
        return [f"{kind} {'.'.join(map(str, exc.path))}: {exc.message}"]
    return []


@cache
def _validator(kind: str) -> Draft202012Validator:
    if kind in ROUTES:
        return Draft202012Validator(ROUTES[kind])
    schema = MODELS[kind].model_json_schema(by_alias=True)
    for part in _objects(schema):
        part.setdefault("additionalProperties", False)
    return Draft202012Validator(schema)


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of the schema that lists properties."""
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            yield schema
        for part in schema.values():
            yield from _objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _objects(part)

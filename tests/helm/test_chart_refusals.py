"""Wrong values are refused before anything reaches a cluster, with what is wrong and what to do."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.helm.rendering import HELMS, MINIMAL, Refused, render

CPU = {"name": "cpu", "kind": "cpu"}
PROXY = {"name": "burst", "kind": "proxy", "upstream": {"existingSecret": "accounts"}}


def pools(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"pools": list(entries)}


BY_SCHEMA: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 2}, "replicas"),
    ({"gateway": {"replica": 2}}, "replica"),
    ({"gateway": {"replicas": "two"}}, "/gateway/replicas': got string, want integer"),
    ({"gateway": {"replicas": -1}}, "/gateway/replicas': minimum"),
    ({"gateway": {"host": "127.0.0.1"}}, "/gateway/host"),
    ({"gateway": {"preStopSeconds": 0.5}}, "/gateway/preStopSeconds"),
    ({"gateway": {"service": {"type": "ExternalName"}}}, "/gateway/service/type"),
    ({"gateway": {"service": {"httpPort": 70000}}}, "/gateway/service/httpPort"),
    ({"gateway": {"maxUnavailable": 0}}, "/gateway/maxUnavailable"),
    ({"gateway": {"extraEnv": [{"value": "9"}]}}, "/gateway/extraEnv/0"),
    ({"images": {"gateway": {"digest": "sha256:abc"}}}, "/images/gateway/digest"),
    ({"images": {"worker": {"digests": {"gpu": ""}}}}, "gpu"),
    ({"images": {"pullPolicy": "Sometimes"}}, "/images/pullPolicy"),
    ({"settings": {"resultRetention": 3600}}, "resultRetention"),
    ({"settings": {"result_retention": "1h"}}, "/settings/result_retention': got string, want number"),
    ({"settings": {"result_retention": 0}}, "/settings/result_retention': exclusiveMinimum"),
    ({"settings": {"precision": "float8"}}, "/settings/precision"),
    ({"settings": {"attempts": 2.5}}, "/settings/attempts"),
    ({"settings": {"redis_url": "redis://:secret@queue:6379/0"}}, "redis_url"),
    ({"poolDefaults": {"settings": {"drain_timeout": 5}}}, "drain_timeout"),
    ({"blobs": {"url": "ftp://somewhere"}}, "/blobs/url"),
    ({"tracing": {"sampleRatio": 2}}, "/tracing/sampleRatio"),
    ({"tracing": {"endpoint": "collector:4317"}}, "/tracing/endpoint"),
    (pools(), "/pools"),
    (pools({"name": "GPU_1", "kind": "gpu"}), "/pools/0/name"),
    (pools({"name": "gpu"}), "kind"),
    (pools({"name": "gpu", "kind": "tpu"}), "/pools/0/kind"),
    (pools(CPU | {"maxSteps": 0}), "/pools/0/maxSteps"),
    (pools(CPU | {"price": 1}), "price"),
    (pools(CPU | {"gpus": 1.5}), "/pools/0/gpus"),
    (pools(CPU | {"shmSize": "1 GB"}), "/pools/0/shmSize"),
    (pools(CPU | {"autoscaling": {"mode": "vpa"}}), "/pools/0/autoscaling/mode"),
    (pools(CPU | {"weights": {"path": "../etc", "claim": "models"}}), "/pools/0/weights/path"),
    (pools(CPU | {"weights": {"path": "m", "download": {"url": "https://models/m", "sha256": "abc"}}}), "sha256"),
    (pools(CPU | {"weights": {"path": "m", "download": {"url": "file:///m", "sha256": "0" * 64}}}), "url"),
    ({"routes": [{"pools": []}]}, "/routes/0/pools"),
    ({"routes": [{"pools": ["cpu"], "classes": ["video"]}]}, "/routes/0/classes/0"),
    ({"networkPolicy": {"keda": []}}, "/networkPolicy/keda"),
    ({"networkPolicy": {"redis": {"ports": []}}}, "/networkPolicy/redis/ports"),
    ({"ingress": {"http": {"hosts": ["a b"]}}}, "/ingress/http/hosts/0"),
    ({"scaler": {"port": 80}}, "/scaler/port"),
    ({"fullnameOverride": "x" * 35}, "/fullnameOverride"),
]

BY_CHART: list[tuple[dict[str, Any], str]] = [
    ({"valkey": {"enabled": True}}, "valkey.enabled and redis.existingSecret exclude each other"),
    ({"redis": {"existingSecret": ""}}, "redis.existingSecret: name a secret with the queue server's URL"),
    ({"tenants": {"existingSecret": ""}}, "tenants.existingSecret: name a secret with the tenants file"),
    ({"blobs": {"url": "file:///blobs"}}, "name in blobs.existingClaim"),
    ({"blobs": {"existingClaim": "blobs"}}, "blobs.existingClaim is for a file:///folder"),
    (
        {"gateway": {"extraEnv": [{"name": "IMG2IMG_LEASE", "value": "9"}]}},
        "gateway.extraEnv: IMG2IMG_LEASE is a setting of the service: put it into settings",
    ),
    (
        pools(CPU | {"extraEnv": [{"name": "IMG2IMG_QUEUE", "value": "a"}]}),
        "pool cpu.extraEnv: IMG2IMG_QUEUE is a setting of the service: put it into settings",
    ),
    ({"gateway": {"terminationGracePeriodSeconds": 49}}, "preStopSeconds, drainSeconds and 10 more (50)"),
    ({"gateway": {"autoscaling": {"minReplicas": 9}}}, "gateway.autoscaling.minReplicas is more than maxReplicas"),
    (
        {"gateway": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
        "gateway.resources.requests.cpu: the HPA reckons in percent of it",
    ),
    (
        pools(CPU | {"resources": {}, "autoscaling": {"mode": "hpa", "metric": "cpu"}}),
        "pool cpu: resources.requests.cpu: the HPA reckons in percent of it",
    ),
    ({"settings": {"lease": 3}}, "gateway.settings: lease (3) must be at least twice beat (2)"),
    (
        {"tracing": {"endpoint": "https://traces.example.com:443"}},
        "networkPolicy.tracing.ports has not the port of tracing.endpoint (443): add it",
    ),
    ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: name the Gateway"),
    ({"grpcRoute": {"enabled": True}}, "grpcRoute.parentRefs: name the Gateway"),
    ({"ingress": {"grpc": {"enabled": True}}}, "ingress.grpc.hosts: name a host"),
    (pools(CPU, CPU), "pool cpu is there twice"),
    (pools(CPU | {"terminationGracePeriodSeconds": 100}), "drainSeconds, the lease and 10 more (136)"),
    (pools(CPU | {"settings": {"beat": 5}}), "pool cpu: settings: lease (6) must be at least twice beat (5)"),
    (pools(CPU | {"model": "a/b", "weights": {"path": "m", "claim": "c"}}), "pool cpu has model and weights"),
    (pools(CPU | {"weights": {"path": "m"}}), "weights come from one of claim, image and download"),
    (pools(CPU | {"hub": {"existingSecret": "hub"}}), "pool cpu loads nothing from a hub"),
    (pools(CPU | {"upstream": {"existingSecret": "a"}}), "which calls no upstream: leave upstream out"),
    (pools({"name": "burst", "kind": "proxy"}), "name in upstream.existingSecret the secret with its accounts"),
    (pools(CPU | {"callsPerMinute": 60}), "which calls no upstream: leave callsPerMinute out"),
    (pools(PROXY | {"model": "a/b"}), "which loads no model"),
    (
        {"scaler": {"operatorSecret": "key"}}
        | pools(
            PROXY
            | {"autoscaling": {"mode": "keda", "trigger": "metrics-api"}, "settings": {"upstream_max_concurrency": 8}}
        ),
        "pool burst: settings.upstream_max_concurrency: gateways reckon with it",
    ),
    (
        {"settings": {"upstream_token_calls": 600}, "gateway": {"settings": {"upstream_token_calls": 300}}}
        | pools(PROXY | {"autoscaling": {"mode": "hpa"}}),
        "pool burst: settings.upstream_token_calls: gateways reckon with it",
    ),
    (
        {"settings": {"safety_checker": "a/checker"}} | pools(CPU, PROXY),
        "pool burst is of the kind proxy, whose image has nothing to run the safety_checker a/checker with",
    ),
    (pools(PROXY | {"stepPrice": 1}), "say with tenantSpendPerDay how much a tenant may spend"),
    (pools(PROXY | {"spendPerDay": 1}), "has a cap and no price"),
    (pools(CPU | {"autoscaling": {"mode": "keda"}}), "set scaler.serverSecret and scaler.clientSecret"),
    (pools(CPU | {"autoscaling": {"mode": "keda", "trigger": "metrics-api"}}), "set scaler.operatorSecret"),
    (pools(CPU | {"autoscaling": {"mode": "hpa", "minReplicas": 0}}), "only keda scales to zero"),
    (pools(CPU | {"autoscaling": {"mode": "hpa", "minReplicas": 9}}), "minReplicas is more than maxReplicas"),
    (
        pools(CPU | {"autoscaling": {"mode": "hpa", "targetSeconds": 9}}),
        "poolDefaults.autoscaling.targetSeconds (60), not with 9",
    ),
    (
        pools(PROXY | {"autoscaling": {"mode": "hpa", "metric": "cpu"}}),
        "CPU in use says nothing of a pool of the kind proxy",
    ),
    (
        pools(CPU | {"autoscaling": {"mode": "keda", "minReplicas": 0}}),
        "say with startSeconds how long its first worker takes",
    ),
    (
        {"gateway": {"readyNeedsWorkers": True}}
        | pools(CPU | {"startSeconds": 60, "autoscaling": {"mode": "keda", "minReplicas": 0}}),
        "no gateway would be ready",
    ),
    ({"routes": [{"pools": ["gpu"]}]}, "route 1 names the pool gpu, which is none of pools"),
    ({"routes": [{"pools": ["cpu"], "classes": ["inpainting"]}]}, "none without a model for text-to-image"),
    (
        {"routes": [{"pools": ["cpu"]}, {"pools": ["cpu"], "model": "m", "classes": ["inpainting"]}]},
        "none for the model m for text-to-image",
    ),
]


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """What Helm says of each, by what it is to say; nothing where it takes the values."""

    def refusal(values: dict[str, Any]) -> str:
        try:
            render("helm4", MINIMAL | values)
        except Refused as exc:
            return str(exc)
        return ""

    every = [*BY_SCHEMA, *BY_CHART]
    with ThreadPoolExecutor() as threads:
        answers = threads.map(refusal, [values for values, _ in every])
        return dict(zip([expected for _, expected in every], answers, strict=True))


@pytest.mark.parametrize("named", [named for _, named in BY_SCHEMA])
def test_the_schema_names_the_value(refusals: dict[str, str], named: str) -> None:
    """Helm says where in the values, or which name nobody knows."""
    assert "don't meet the specifications of the schema" in refusals[named]
    assert named in refusals[named]


@pytest.mark.parametrize("said", [said for _, said in BY_CHART])
def test_the_chart_says_what_contradicts_what(refusals: dict[str, str], said: str) -> None:
    """With the value and the remedy, in one line."""
    assert said in refusals[said]


def test_no_refusal_hides_another() -> None:
    """Each case has an answer of its own to look for."""
    expected = [words for _, words in (*BY_SCHEMA, *BY_CHART)]
    assert len(set(expected)) == len(expected)


def test_gateways_may_know_what_they_reckon_with() -> None:
    """Settings of everybody, and limits of a pool whose calls are bounded by a field of its own."""
    scaled = PROXY | {"autoscaling": {"mode": "hpa"}}
    assert render("helm4", MINIMAL | {"settings": {"upstream_max_concurrency": 8}} | pools(scaled))
    bounded = scaled | {"callsPerMinute": 60, "settings": {"upstream_token_calls": 600}}
    assert render("helm4", MINIMAL | pools(bounded))


@pytest.mark.parametrize("program", HELMS)
def test_both_helms_refuse(program: str) -> None:
    """An old Helm reads the schema and the checks as a new one does."""
    for values in (BY_SCHEMA[0][0], BY_CHART[0][0]):
        with pytest.raises(Refused):
            render(program, MINIMAL | values)

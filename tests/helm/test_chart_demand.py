"""What KEDA would be told: the triggers of the chart, against a gateway with the variables of the chart's."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from gateway.rpc.externalscaler.externalscaler_pb2 import GetMetricsRequest, ScaledObjectRef
from gateway.rpc.externalscaler.externalscaler_pb2_grpc import ExternalScalerStub
from tests.helm.pods import KEY, OPERATORS_KEY, Pod, mount
from tests.helm.rendering import MINIMAL, Rendered, render

SECONDS: Final = 60.0
"""For one call: a busy machine may take its time."""
FROM_ZERO: Final = {"mode": "keda", "minReplicas": 0, "maxReplicas": 4, "targetSeconds": 40}
VALUES: Final = MINIMAL | {
    "scaler": {"serverSecret": "server", "clientSecret": "client", "operatorSecret": "operator"},
    "pools": [
        {"name": "pushed", "kind": "fake", "startSeconds": 60, "autoscaling": FROM_ZERO},
        {"name": "polled", "kind": "fake", "startSeconds": 60, "autoscaling": FROM_ZERO | {"trigger": "metrics-api"}},
    ],
    "routes": [{"pools": ["pushed"]}, {"pools": ["polled"], "model": "polled"}],
}


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render("helm4", VALUES)


@pytest.fixture(scope="module")
def gateway(
    rendered: Rendered, valkey_url: str, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pod]:
    """With a job in each pool, and no worker anywhere."""
    files = tmp_path_factory.mktemp("etc")
    mount(rendered, files)
    (files / "scaler").mkdir()
    for source, name in zip((*certificate, certificate[0]), ("tls.crt", "tls.key", "ca.crt"), strict=True):
        shutil.copy(source, files / "scaler" / name)
    spec = rendered.named("Deployment", "pictures-img2img-gateway")["spec"]["template"]["spec"]
    pod = Pod(spec["containers"][0], files, valkey_url)
    try:
        for options in ({}, {"model": "polled"}):
            with _client(pod, KEY) as client:
                answer = client.post("/v1/jobs", json={"prompt": "a", "options": options})
            assert answer.status_code == 202, answer.text
        yield pod
    finally:
        pod.process.close()


def _client(pod: Pod, key: str) -> httpx.Client:
    address, headers = f"http://127.0.0.1:{pod.ports['http']}", {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=SECONDS)


def _trigger(rendered: Rendered, pool: str) -> dict[str, Any]:
    [trigger] = rendered.named("ScaledObject", f"pictures-img2img-worker-{pool}")["spec"]["triggers"]
    return trigger


def test_a_pool_at_zero_is_active_over_mutual_tls(
    rendered: Rendered, gateway: Pod, certificate: tuple[Path, Path]
) -> None:
    """The trigger's metadata, which KEDA passes on as they are, are what the gateway reads."""
    cert, key = (path.read_bytes() for path in certificate)
    trusted = grpc.ssl_channel_credentials(root_certificates=cert, private_key=key, certificate_chain=cert)
    reference = ScaledObjectRef(
        name="pushed", namespace="imaging", scalerMetadata=_trigger(rendered, "pushed")["metadata"]
    )
    with grpc.secure_channel(f"127.0.0.1:{gateway.ports['scaler']}", trusted) as channel:
        scaler = ExternalScalerStub(channel)
        assert scaler.IsActive(reference, timeout=SECONDS).result
        [spec] = scaler.GetMetricSpec(reference, timeout=SECONDS).metricSpecs
        assert spec.targetSizeFloat == 40
        asked = GetMetricsRequest(scaledObjectRef=reference, metricName=spec.metricName)
        [value] = scaler.GetMetrics(asked, timeout=SECONDS).metricValues
        assert value.metricValueFloat > 0


def test_a_pool_at_zero_has_a_demand_that_can_be_polled(rendered: Rendered, gateway: Pod) -> None:
    """By the path and the field that the trigger names, with the operator's key, and with no other."""
    metadata = _trigger(rendered, "polled")["metadata"]
    url = urlsplit(metadata["url"])
    address = f"{url.path}?{url.query}"
    with _client(gateway, OPERATORS_KEY) as client:
        answer = client.get(address)
    assert answer.status_code == 200, answer.text
    assert answer.json()[metadata["valueLocation"]] > float(metadata["activationTargetValue"])
    with _client(gateway, KEY) as client:
        assert client.get(address).status_code == 403

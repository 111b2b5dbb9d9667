"""What the chart renders: valid objects, which find each other, start, stop and scale as they should."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.rendering import CASES, CHART, HELMS, MINIMAL, NAMESPACE, RELEASE, Rendered, environment, helm, render
from tests.helm.schemas import mistakes

Releases = dict[tuple[str, str], Rendered]
PICTURES = "pictures-img2img"


def pool(name: str = "cpu", kind: str = "cpu", **fields: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, **fields}


@pytest.mark.parametrize("case", CASES)
def test_both_helms_render_the_same(releases: Releases, case: str) -> None:
    """The text may differ, the objects do not."""
    assert releases["helm3", case] == releases["helm4", case]


def test_objects_are_what_their_schemas_say(release: Rendered) -> None:
    """Kubernetes' own, KEDA's, the Prometheus operator's and the Gateway API's; unknown fields are mistakes."""
    assert [wrong for item in release for wrong in mistakes(item)] == []


def test_schemas_see_mistakes(releases: Releases) -> None:
    """In every kind of object: a field that there is not, and one of the wrong type."""
    one_of_each = {item["kind"]: item for item in releases["helm4", "everything"]}
    for item in one_of_each.values():
        assert mistakes(item | {"specs": {}}) != [], item["kind"]
        if "spec" in item:
            field = sorted(item["spec"])[0]
            assert mistakes(item | {"spec": item["spec"] | {"replica": 1}}) != [], item["kind"]
            assert mistakes(item | {"spec": item["spec"] | {field: [[]]}}) != [], (item["kind"], field)


def test_requests_are_within_limits(release: Rendered) -> None:
    """Kubernetes would refuse the pod."""
    for name, container in release.containers():
        resources = container["resources"]
        for kind in resources["requests"].keys() & resources["limits"].keys():
            assert _amount(resources["requests"][kind]) <= _amount(resources["limits"][kind]), (name, kind)


def _amount(quantity: str) -> float:
    units = {"m": 0.001, "Mi": 1024**2, "Gi": 1024**3}
    number, unit = next(
        ((quantity.removesuffix(end), units[end]) for end in units if quantity.endswith(end)), (quantity, 1)
    )
    return float(number) * unit


def test_a_package_is_the_chart(releases: Releases, tmp_path: Path) -> None:
    """`helm package` takes all that it needs, and no more: the same objects come of it."""
    for program in HELMS:
        helm(program, "package", str(CHART), "-d", str(tmp_path))
        [package] = tmp_path.glob("*.tgz")
        with tarfile.open(package) as files:
            assert not [name for name in files.getnames() if "/ci/" in name]
        values = CHART / "ci" / "everything-values.yaml"
        text = helm(program, "template", RELEASE, str(package), "-n", NAMESPACE, "-f", str(values))
        assert [item for item in yaml.safe_load_all(text) if item] == releases[program, "everything"]


def test_every_kind_of_object_appears(releases: Releases) -> None:
    """So that no template goes unrendered by these tests."""
    kinds = {item["kind"] for rendered in releases.values() for item in rendered}
    assert kinds == {
        "ConfigMap", "Deployment", "GRPCRoute", "HTTPRoute", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy",
        "Pod", "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "ScaledObject", "Service", "ServiceAccount",
        "ServiceMonitor", "StatefulSet", "TriggerAuthentication",
    }  # fmt: skip


def test_names_are_short_and_unique(release: Rendered) -> None:
    """63 characters serve as label, too, which KEDA makes of them."""
    names = [(item["kind"], item["metadata"]["name"]) for item in release]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)
    assert all(item["metadata"].get("namespace", "imaging") == "imaging" for item in release)


def test_selectors_match_their_pods_and_no_others(release: Rendered) -> None:
    """Deployments select their own pods only; services and budgets select some."""
    pods = {name: pod["metadata"]["labels"] for name, pod in release.pods()}
    for item in release.of("Deployment", "StatefulSet"):
        assert _selected(pods, item["spec"]["selector"]["matchLabels"]) == [item["metadata"]["name"]]
    for item in release.of("PodDisruptionBudget"):
        assert _selected(pods, item["spec"]["selector"]["matchLabels"]) == [item["metadata"]["name"]]
    for item in release.of("Service"):
        assert len(_selected(pods, item["spec"]["selector"])) == 1


def _selected(pods: dict[str, dict[str, str]], wanted: dict[str, str]) -> list[str]:
    return [name for name, labels in pods.items() if wanted.items() <= labels.items()]


def test_ports_have_names_that_somebody_listens_under(release: Rendered) -> None:
    """Services, probes and policies speak of ports by name: each is one of the container that it is about."""
    pods = dict(release.pods())
    for service in release.of("Service"):
        [name] = _selected({name: pod["metadata"]["labels"] for name, pod in pods.items()}, service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= _ports(pods[name])
    for _, container in release.containers():
        ports = {port["name"] for port in container.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            action = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get("tcpSocket")
            assert action is None or action["port"] in ports


def _ports(pod: dict[str, Any]) -> set[str]:
    return {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", ())}


def test_what_is_mounted_is_a_volume(release: Rendered) -> None:
    """And every volume is mounted by somebody."""
    for _, pod in release.pods():
        containers = [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
        mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", ())}
        claims = {"data"} if "volumes" not in pod["spec"] else set()
        assert mounted == {volume["name"] for volume in pod["spec"].get("volumes", ())} | claims


def test_a_pool_has_its_queue_kind_and_resources(releases: Releases) -> None:
    """Image by kind, GPUs on top of the other limits, the queue of its name."""
    rendered = releases["helm4", "everything"]
    gpu = rendered.named("Deployment", "pictures-worker-gpu")["spec"]["template"]["spec"]["containers"][0]
    assert gpu["image"] == "img2img-worker:0.1.0-cuda"
    assert gpu["resources"]["limits"]["example.com/h100"] == 2
    assert gpu["resources"]["limits"]["memory"] == "6Gi"
    assert environment(gpu)["IMG2IMG_QUEUE"] == "gpu"
    burst = rendered.named("Deployment", "pictures-worker-burst")["spec"]["template"]["spec"]["containers"][0]
    assert burst["image"] == "img2img-worker:0.1.0-proxy"
    assert "nvidia.com/gpu" not in burst["resources"]["limits"]


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({"kind": "gpu"}, "cuda:0"),
        ({"kind": "gpu", "gpus": 3}, "cuda:0,cuda:1,cuda:2"),
        ({"kind": "gpu", "gpus": 0}, "cuda"),
        ({"kind": "gpu", "settings": {"device": "auto"}}, "auto"),
        ({"kind": "cpu"}, None),
    ],
)
def test_a_gpu_pool_uses_all_its_gpus_and_no_cpu(given: dict[str, Any], device: str | None) -> None:
    """Where the driver is not to be seen a worker ends and says so, in place of taking minutes for each picture."""
    rendered = render("helm4", MINIMAL | {"pools": [pool(**given)]})
    [container] = rendered.named("Deployment", f"{PICTURES}-worker-cpu")["spec"]["template"]["spec"]["containers"]
    assert environment(container).get("IMG2IMG_DEVICE") == device


def test_a_digest_wins_over_a_tag(releases: Releases) -> None:
    """What was checked is what runs."""
    rendered = releases["helm4", "gpu-keda"]
    images = {container["image"] for _, container in rendered.containers()}
    digest = "0123456789abcdef" * 4
    assert images == {
        "registry.example.com/img2img-gateway:1.2.3",
        f"registry.example.com/img2img-worker@sha256:{digest}",
    }


def test_defaults_hold_for_what_a_pool_leaves_out() -> None:
    """Maps are joined, and zero and false count as said."""
    defaults = {"autoscaling": {"mode": "keda", "maxReplicas": 7, "minReplicas": 2}, "settings": {"compile": True}}
    own = {"autoscaling": {"minReplicas": 0}, "startSeconds": 60, "settings": {"compile": False, "max_rows": 4}}
    values = MINIMAL | {"poolDefaults": defaults, "pools": [pool(**own)], "scaler": SCALER}
    rendered = render("helm4", values)
    scaled = rendered.named("ScaledObject", f"{PICTURES}-worker-cpu")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (0, 7)
    container = rendered.named("Deployment", f"{PICTURES}-worker-cpu")["spec"]["template"]["spec"]["containers"][0]
    assert environment(container)["IMG2IMG_COMPILE"] == "false"
    assert environment(container)["IMG2IMG_MAX_ROWS"] == "4"


SCALER = {"serverSecret": "server", "clientSecret": "client", "operatorSecret": "operator"}


@pytest.mark.parametrize(("mode", "has_replicas"), [("none", True), ("keda", False), ("hpa", False)])
def test_replicas_are_left_to_who_scales(mode: str, has_replicas: bool) -> None:
    """An upgrade must not put the number back."""
    rendered = render("helm4", MINIMAL | {"scaler": SCALER, "poolDefaults": {"autoscaling": {"mode": mode}}})
    worker = rendered.named("Deployment", f"{PICTURES}-worker-cpu")
    assert ("replicas" in worker["spec"]) is has_replicas
    scalers = rendered.of("ScaledObject", "HorizontalPodAutoscaler")
    targets = [item["spec"]["scaleTargetRef"]["name"] for item in scalers]
    assert targets == ([] if has_replicas else [f"{PICTURES}-worker-cpu"])


def test_keda_asks_the_gateways_over_mutual_tls(releases: Releases) -> None:
    """Address, pool, target, and the secret with its certificate."""
    rendered = releases["helm4", "gpu-keda"]
    [trigger] = rendered.named("ScaledObject", f"{PICTURES}-worker-gpu")["spec"]["triggers"]
    assert trigger["type"] == "external-push"
    assert trigger["metadata"] == {
        "scalerAddress": f"{PICTURES}-scaler.imaging.svc:6000", "pool": "gpu", "targetSeconds": "160",
        "activationSeconds": "0",
    }  # fmt: skip
    [service] = [item for item in rendered.of("Service") if item["metadata"]["name"] == f"{PICTURES}-scaler"]
    assert service["spec"]["ports"][0]["port"] == 6000
    authentication = rendered.named("TriggerAuthentication", trigger["authenticationRef"]["name"])
    given = {entry["parameter"]: (entry["name"], entry["key"]) for entry in authentication["spec"]["secretTargetRef"]}
    assert given == {
        "caCert": ("img2img-keda", "ca.crt"), "tlsClientCert": ("img2img-keda", "tls.crt"),
        "tlsClientKey": ("img2img-keda", "tls.key"),
    }  # fmt: skip


def test_keda_polls_with_an_operators_key(releases: Releases) -> None:
    """The same number, with the target that it is reckoned with."""
    rendered = releases["helm4", "proxy-pools"]
    [trigger] = rendered.named("ScaledObject", f"{PICTURES}-worker-burst")["spec"]["triggers"]
    address = f"http://{PICTURES}.imaging.svc:8000/v1/scaling/burst?target_seconds=600"
    assert trigger["metadata"]["url"] == address
    assert (trigger["metadata"]["targetValue"], trigger["metadata"]["activationTargetValue"]) == ("600", "5")
    assert (trigger["metadata"]["valueLocation"], trigger["metadata"]["authMode"]) == ("demand_seconds", "bearer")
    authentication = rendered.named("TriggerAuthentication", trigger["authenticationRef"]["name"])
    assert authentication["spec"]["secretTargetRef"] == [
        {"parameter": "token", "name": "img2img-operator", "key": "key"}
    ]


def test_the_hpa_goes_by_demand_or_by_cpu(releases: Releases) -> None:
    """The demand, with the target that gateways reckon it with; up at once, down late and by one worker a minute."""
    rendered = releases["helm4", "cpu-hpa"]
    large = rendered.named("HorizontalPodAutoscaler", f"{PICTURES}-worker-large")["spec"]
    [metric] = large["metrics"]
    assert metric["external"]["metric"]["name"] == "img2img_queue_demand_seconds"
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "120"}
    gateway = rendered.named("Deployment", f"{PICTURES}-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert environment(gateway)["IMG2IMG_SCALER_TARGET_SECONDS"] == "120"
    up, down = large["behavior"]["scaleUp"], large["behavior"]["scaleDown"]
    assert up["stabilizationWindowSeconds"] == 0
    assert up["policies"] == [{"type": "Percent", "value": 900, "periodSeconds": 15}]
    assert down["stabilizationWindowSeconds"] == 300
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]


def test_cpu_is_that_of_the_container_that_requests_it(release: Rendered) -> None:
    """Of a whole pod the HPA would know none as long as a sidecar requests none."""
    targets = {item["metadata"]["name"]: item["spec"]["template"]["spec"] for item in release.of("Deployment")}
    for item in release.of("HorizontalPodAutoscaler"):
        [metric] = item["spec"]["metrics"]
        if metric["type"] != "External":
            source = metric["containerResource"]
            spec = targets[item["spec"]["scaleTargetRef"]["name"]]
            [container] = [one for one in spec["containers"] if one["name"] == source["container"]]
            assert source["name"] in container["resources"]["requests"]


@pytest.mark.parametrize(
    ("given", "gateway", "worker"),
    [
        ({}, 50, 136),
        ({"gateway": {"drainSeconds": 60.5, "preStopSeconds": 20}}, 91, 136),
        ({"poolDefaults": {"drainSeconds": 300}, "settings": {"lease": 12, "beat": 3}}, 50, 322),
        (
            {"gateway": {"terminationGracePeriodSeconds": 100}, "poolDefaults": {"terminationGracePeriodSeconds": 900}},
            100,
            900,
        ),
    ],
)
def test_pods_have_time_to_end(given: dict[str, Any], gateway: int, worker: int) -> None:
    """The grace period follows from the drain limit that the process gets."""
    rendered = render("helm4", MINIMAL | given)
    for name, expected in (("gateway", gateway), ("worker-cpu", worker)):
        spec = rendered.named("Deployment", f"{PICTURES}-{name}")["spec"]["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] == expected
        drain = float(environment(spec["containers"][0])["IMG2IMG_DRAIN_TIMEOUT"])
        sleep = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert expected >= drain + sleep


def test_a_gateway_is_ready_without_workers() -> None:
    """A pool at zero needs somebody to take its first job; the kubelet's gRPC probe knows no TLS."""
    for given, action in (
        ({}, {"grpc": {"port": 50051}}),
        ({"tls": {"existingSecret": "tls"}}, {"httpGet": {"path": "/health/live", "port": "http", "scheme": "HTTPS"}}),
        ({"readyNeedsWorkers": True}, {"httpGet": {"path": "/health/ready", "port": "http", "scheme": "HTTP"}}),
    ):
        rendered = render("helm4", MINIMAL | {"gateway": given})
        [container] = rendered.named("Deployment", f"{PICTURES}-gateway")["spec"]["template"]["spec"]["containers"]
        assert action.items() <= container["readinessProbe"].items()
        assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


@pytest.mark.parametrize(("settings", "seconds"), [({}, 1860), ({"phase_limit": 900}, 2760)])
def test_a_worker_may_load_for_as_long_as_its_watchdog_allows(settings: dict[str, Any], seconds: int) -> None:
    """And is live by its own word, which has nothing of Redis."""
    rendered = render("helm4", MINIMAL | {"poolDefaults": {"settings": settings}})
    spec = rendered.named("Deployment", f"{PICTURES}-worker-cpu")["spec"]
    [container] = spec["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == seconds
    # Kubernetes' own ten minutes would call the update failed meanwhile.
    assert spec["progressDeadlineSeconds"] > seconds + spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert startup["httpGet"] == {"path": "/health/ready", "port": "metrics"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "metrics"}


def test_a_changed_pool_starts_everybody_anew() -> None:
    """Gateways and workers read the file at their start."""
    before = render("helm4", MINIMAL)
    after = render("helm4", MINIMAL | {"pools": [pool(maxSteps=10)]})
    for rendered in (before, after):
        assert len({_checksum(pod) for _, pod in rendered.pods()}) == 1
    assert {_checksum(pod) for _, pod in before.pods()}.isdisjoint({_checksum(pod) for _, pod in after.pods()})


def _checksum(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["annotations"]["checksum/pools"])


def test_weights_come_from_one_place(releases: Releases) -> None:
    """A claim, a download whose hash an init container checks, or an image volume: at /models, read-only."""
    volumes, mounts = {}, []
    for case, name in (
        ("gpu-keda", f"{PICTURES}-worker-gpu"),
        ("cpu-hpa", f"{PICTURES}-worker-large"),
        ("everything", "pictures-worker-gpu"),
    ):
        spec = releases["helm4", case].named("Deployment", name)["spec"]["template"]["spec"]
        [volume] = [volume for volume in spec["volumes"] if volume["name"] == "models"]
        volumes[case] = next(kind for kind in volume if kind != "name")
        mounts += [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "models"]
    assert volumes == {"gpu-keda": "persistentVolumeClaim", "cpu-hpa": "emptyDir", "everything": "image"}
    assert mounts == [{"name": "models", "mountPath": "/models", "readOnly": True}] * 3
    large = releases["helm4", "cpu-hpa"].named("Deployment", f"{PICTURES}-worker-large")["spec"]["template"]["spec"]
    [fetch] = large["initContainers"]
    assert fetch["command"][-1] == "/etc/img2img/pools/fetch.py"
    assert fetch["args"][1:] == [
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa", "/models/v1-5-pruned-emaonly.safetensors"
    ]  # fmt: skip


def test_a_download_has_the_variables_and_files_of_its_pool() -> None:
    """A proxy and an authority of one's own are for the weights, too."""
    weights = {"path": "m", "download": {"url": "https://models/m", "sha256": "0" * 64}}
    more = {
        "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/more/ca.crt"}],
        "extraEnvFrom": [{"configMapRef": {"name": "proxies"}}],
        "extraVolumes": [{"name": "more", "configMap": {"name": "authority"}}],
        "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    }
    rendered = render("helm4", MINIMAL | {"pools": [pool(weights=weights, **more)]})
    spec = rendered.named("Deployment", f"{PICTURES}-worker-cpu")["spec"]["template"]["spec"]
    [fetch] = spec["initContainers"]
    for container in (fetch, *spec["containers"]):
        assert more["extraVolumeMounts"][0] in container["volumeMounts"]
        assert more["extraEnvFrom"][0] in container["envFrom"]
        assert environment(container)["SSL_CERT_FILE"] == "/more/ca.crt"


def test_the_test_makes_a_picture_with_a_key(releases: Releases) -> None:
    """`helm test` is a job, through the service's gRPC port."""
    pod = releases["helm4", "none-autoscaling"].named("Pod", f"{PICTURES}-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    assert container["args"][:2] == ["generate", "a lion"]
    assert environment(container)["IMG2IMG_SERVER"] == f"{PICTURES}.imaging.svc:50051"
    assert environment(container)["IMG2IMG_KEY"] == {"secretKeyRef": {"name": "img2img-key", "key": "key"}}

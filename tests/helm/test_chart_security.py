"""What the chart's pods may do, what the network lets through, and that no secret is anywhere but in secrets."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from tests.helm.rendering import CASES, CHART, MINIMAL, ROOT, Rendered, environment, render

Releases = dict[tuple[str, str], Rendered]
PICTURES = "pictures-img2img"
CHECKOV: Final = ROOT / ".venv" / "checkov" / "bin" / "checkov"
ACCEPTED: Final = {
    # No CPU limits: who is throttled misses deadlines, and requests keep the shares.
    "CKV_K8S_11": ".*",
    # Tags are versions, which do not change; a node that has the image need not ask for it.
    "CKV_K8S_15": ".*",
    # The queue server's URL, the test's key and a hub's token come from existing secrets.
    "CKV_K8S_35": ".*",
    # Digests are for the user to give; the default is the chart's own version.
    "CKV_K8S_43": ".*",
    # No probes for a test that makes one picture and ends.
    "CKV_K8S_8": "Pod.*-test",
    "CKV_K8S_9": "Pod.*-test",
}
"""Policies that the chart breaks on purpose, and by which objects."""
FOREIGN: Final = ("before", "beside")
"""Containers of the case "everything" that stand for the user's own."""


def test_pods_are_restricted(release: Rendered) -> None:
    """The restricted pod security standard, a read-only root, no token, limits for memory and disk."""
    for name, pod in release.pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not [volume for volume in spec.get("volumes", ()) if "hostPath" in volume], name
    for name, container in release.containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys(), name
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name


def test_the_cluster_may_choose_user_and_groups() -> None:
    """As OpenShift does, which refuses pods that say who they are; of gateway, worker, queue server and test."""
    rendered = render("helm4", {"fixedUser": False}, CHART / "ci" / "none-autoscaling-values.yaml")
    contexts = {name: pod["spec"]["securityContext"] for name, pod in rendered.pods()}
    assert len(contexts) >= 4
    for name, context in contexts.items():
        assert context.keys() == {"runAsNonRoot", "fsGroupChangePolicy", "seccompProfile"}, name
        assert context["runAsNonRoot"] is True
    for name, container in rendered.containers():
        assert not {"runAsUser", "runAsGroup"} & container["securityContext"].keys(), name


def test_workers_can_write_where_they_must(release: Rendered) -> None:
    """/tmp, the cache, and shared memory, each with a bound."""
    for item in release.of("Deployment"):
        if "-worker-" not in item["metadata"]["name"]:
            continue
        spec = item["spec"]["template"]["spec"]
        paths = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {"/tmp", "/cache", "/dev/shm"} <= paths.keys()
        assert volumes[paths["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        empty = [volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume and volume["name"] != "more"]
        assert all("sizeLimit" in directory for directory in empty)


def test_service_accounts_have_no_token(release: Rendered) -> None:
    assert [item["automountServiceAccountToken"] for item in release.of("ServiceAccount")] == [False]


def test_the_chart_makes_no_secret_and_holds_none(release: Rendered) -> None:
    """Passwords, tokens and keys come from existing secrets; the tenants file and accounts are mounted."""
    assert release.of("Secret") == []
    for name, container in release.containers():
        for variable, value in environment(container).items():
            if (
                re.search(r"REDIS_URL|KEY$|TOKEN$|PASSWORD|HEADERS|AUTHORIZATION", variable)
                and "TLS_KEY" not in variable
            ):
                plain = isinstance(value, str)
                assert not plain or re.fullmatch(r"redis://[\w-]+-valkey:6379/0", value), f"{name} {variable}"
    for item in release.of("ConfigMap"):
        assert not re.search(r"(?i)password|secret|token *=|key_sha256", json.dumps(item.get("data"))), item[
            "metadata"
        ]["name"]


def test_existing_secrets_are_the_only_source(releases: Releases) -> None:
    """Each reference is to a secret that the values name."""
    for case in CASES:
        rendered, values = releases["helm4", case], (Path(ROOT) / "helm/img2img/ci" / f"{case}-values.yaml").read_text()
        found = set(
            re.findall(
                r'"(?:secretName|secretKeyRef|secretRef)": (?:"([^"]+)"|\{[^}]*"name": "([^"]+)")', json.dumps(rendered)
            )
        )
        names = {first or second for first, second in found}
        assert names
        assert [name for name in names if name not in values] == []


def flows(rendered: Rendered, policy: str, direction: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Ports and peers of a policy's rules; None is everybody."""
    rules = rendered.named("NetworkPolicy", policy)["spec"].get(direction, [])
    peers = {"ingress": "from", "egress": "to"}[direction]
    return [(tuple(port["port"] for port in rule["ports"]), rule.get(peers)) for rule in rules]


def test_nothing_passes_but_what_is_named(release: Rendered) -> None:
    """One policy denies all to every pod, and each pod has one that allows; no rule is without ports."""
    policies = release.of("NetworkPolicy")
    [nothing] = [item for item in policies if item["metadata"]["name"].endswith("-none")]
    assert nothing["spec"].keys() == {"podSelector", "policyTypes"}
    for _, pod in release.pods():
        labels = pod["metadata"]["labels"].items()
        selecting = [item for item in policies if item["spec"]["podSelector"]["matchLabels"].items() <= labels]
        assert len(selecting) == 2
    for item in policies:
        assert item["spec"]["policyTypes"] == ["Ingress", "Egress"]
        for rule in [*item["spec"].get("ingress", ()), *item["spec"].get("egress", ())]:
            assert rule["ports"]
            assert rule.get("from", rule.get("to", True))


def test_flows_of_a_plain_release(releases: Releases) -> None:
    """Calls from anywhere, metrics and demand from their namespaces; names and the queue server, no more."""
    rendered = releases["helm4", "minimal"]
    assert [ports for ports, _ in flows(rendered, f"{PICTURES}-gateway", "ingress")] == [("http", "grpc"), ("http",)]
    assert flows(rendered, f"{PICTURES}-gateway", "ingress")[0][1] is None
    for policy in (f"{PICTURES}-gateway", f"{PICTURES}-worker-cpu"):
        assert [ports for ports, _ in flows(rendered, policy, "egress")] == [(53, 53), (6379,)]
    assert [ports for ports, _ in flows(rendered, f"{PICTURES}-worker-cpu", "ingress")] == [("metrics",)]


def test_only_proxies_reach_the_upstream(releases: Releases) -> None:
    """And only who downloads a model the place that it comes from."""
    rendered = releases["helm4", "proxy-pools"]
    outside = {
        name: [ports for ports, _ in flows(rendered, f"{PICTURES}-worker-{name}", "egress")][2:]
        for name in ("gpu", "burst", "partner")
    }
    assert outside == {"gpu": [(443,)], "burst": [(443, 8443)], "partner": [(443, 8443)]}
    assert [ports for ports, _ in flows(rendered, f"{PICTURES}-gateway", "egress")] == [(53, 53), (6379,)]
    cpu = releases["helm4", "cpu-hpa"]
    assert [ports for ports, _ in flows(cpu, f"{PICTURES}-worker-large", "egress")][2:] == [(443,)]
    assert [ports for ports, _ in flows(cpu, f"{PICTURES}-worker-small", "egress")][2:] == []


def test_flows_follow_what_is_switched_on(releases: Releases) -> None:
    """Sentinels, an object store, traces, KEDA, the test, a queue server of one's own."""
    [_, redis] = flows(releases["helm4", "external-sentinel"], f"{PICTURES}-gateway", "egress")
    assert redis[0] == (6379, 26379)
    assert redis[1][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "valkey"}
    assert [ports for ports, _ in flows(releases["helm4", "s3-blobs"], f"{PICTURES}-worker-cpu", "egress")][2:] == [
        (9000,)
    ]
    assert [ports for ports, _ in flows(releases["helm4", "everything"], "pictures-worker-cpu", "egress")][2:] == [
        (4317,)
    ]
    scrapers = [peers for _, peers in flows(releases["helm4", "gpu-keda"], f"{PICTURES}-gateway", "ingress")][1]
    assert len(scrapers) == 1, "KEDA has no need of HTTP where gateways tell it"
    assert len(flows(releases["helm4", "proxy-pools"], f"{PICTURES}-gateway", "ingress")[1][1]) == 2
    keda = flows(releases["helm4", "gpu-keda"], f"{PICTURES}-gateway", "ingress")[-1]
    assert keda == (("scaler",), [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}}])
    rendered = releases["helm4", "none-autoscaling"]
    assert [ports for ports, _ in flows(rendered, f"{PICTURES}-test", "egress")] == [(53, 53), ("grpc",)]
    assert flows(rendered, f"{PICTURES}-valkey", "egress") == []
    assert [ports for ports, _ in flows(rendered, f"{PICTURES}-valkey", "ingress")] == [(6379,)]


def test_names_are_looked_up_where_the_cluster_has_it() -> None:
    """Policies see the port of the pods, which on OpenShift is not that of their service."""
    values = {"networkPolicy": {"dnsPort": 5353}, "test": {"existingSecret": "key"}}
    rendered = render("helm4", MINIMAL | values)
    for policy in (f"{PICTURES}-gateway", f"{PICTURES}-worker-cpu", f"{PICTURES}-test"):
        assert flows(rendered, policy, "egress")[0][0] == (5353, 5353)


def test_named_clients_only() -> None:
    """With clients the test of the release may call, too, and nobody else."""
    clients = [{"podSelector": {"matchLabels": {"app": "shop"}}}]
    rendered = render("helm4", MINIMAL | {"networkPolicy": {"clients": clients}, "test": {"existingSecret": "key"}})
    peers = flows(rendered, f"{PICTURES}-gateway", "ingress")[0][1]
    assert peers[0] == clients[0]
    assert peers[1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert len(peers) == 2


def test_checkov_finds_only_what_is_accepted(releases: Releases, tmp_path: Path) -> None:
    """All cases at once; each exception is one that checkov still makes."""
    for case in CASES:
        own = [_without_foreign(item) for item in releases["helm4", case]]
        (tmp_path / f"{case}.yaml").write_text(yaml.dump_all(own, Dumper=yaml.CSafeDumper))
    command = [
        CHECKOV,
        "--framework",
        "kubernetes",
        "--skip-download",
        "--quiet",
        "--compact",
        "-o",
        "json",
        "-d",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    failed = json.loads(done.stdout)["results"]["failed_checks"]
    found = {(check["check_id"], check["check_name"], check["resource"]) for check in failed}
    assert {item for item in found if not re.fullmatch(ACCEPTED.get(item[0], ""), item[2])} == set()
    assert {check["check_id"] for check in failed} == ACCEPTED.keys()


def _without_foreign(item: Any) -> Any:
    """The object without containers that are not the chart's."""
    if isinstance(item, list):
        return [_without_foreign(part) for part in item if not (isinstance(part, dict) and part.get("name") in FOREIGN)]
    return {key: _without_foreign(value) for key, value in item.items()} if isinstance(item, dict) else item

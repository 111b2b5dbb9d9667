"""What the chart starts, started: processes with a pod's variables, files and commands, and its probes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.helm.pods import KEY, Pod, mount
from tests.helm.rendering import Rendered, environment
from tests.stack import eventually

Releases = dict[tuple[str, str], Rendered]
PICTURES: Final = "pictures-img2img"


@pytest.fixture(scope="module")
def release(releases: Releases, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[dict[str, Pod]]:
    """Gateway and worker of the case that needs no GPU."""
    rendered, files = releases["helm4", "none-autoscaling"], tmp_path_factory.mktemp("etc")
    mount(rendered, files)
    pods: dict[str, Pod] = {}
    try:
        for name in ("gateway", "worker-fake"):
            spec = rendered.named("Deployment", f"{PICTURES}-{name}")["spec"]["template"]["spec"]
            pods[name] = Pod(spec["containers"][0], files, valkey_url)
        yield pods
    finally:
        for pod in reversed(pods.values()):
            pod.process.close()


@pytest.mark.parametrize("name", ["gateway", "worker-fake"])
def test_probes_pass(release: dict[str, Pod], name: str) -> None:
    """Each of the three, at the ports and paths that the pod names."""
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        eventually(lambda probe=probe: release[name].passes(probe), f"{name} to pass its {probe}")


def test_the_outside_reaches_the_api_and_no_metrics(releases: Releases, release: dict[str, Pod]) -> None:
    """By the Ingress and by the HTTPRoute; metrics need no key, and say how much is done and spent."""
    url = f"http://127.0.0.1:{release['gateway'].ports['http']}"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        known = client.get("/schema/openapi.json").raise_for_status().json()["paths"]
        assert client.get("/metrics").is_success
    rendered = releases["helm4", "everything"]
    [rule] = rendered.named("Ingress", "pictures-http")["spec"]["rules"]
    [route] = rendered.named("HTTPRoute", "pictures-http")["spec"]["rules"]
    by_ingress = [path["path"] for path in rule["http"]["paths"]]
    assert [match["path"]["value"] for match in route["matches"]] == by_ingress
    for path in (*known, "/schema/openapi.json"):
        assert any(path.startswith(f"{prefix}/") for prefix in by_ingress), path
    assert not [prefix for prefix in by_ingress if "/metrics".startswith(prefix)]


def test_the_tests_command_makes_a_picture(releases: Releases, release: dict[str, Pod], tmp_path: Path) -> None:
    """What `helm test` runs, with its arguments, over gRPC and with a key."""
    pod = releases["helm4", "none-autoscaling"].named("Pod", f"{PICTURES}-test")
    [container] = pod["spec"]["containers"]
    arguments = [argument.replace("/tmp/", f"{tmp_path}/") for argument in container["args"]]
    server = f"127.0.0.1:{release['gateway'].ports['grpc']}"
    assert environment(container).keys() == {"IMG2IMG_SERVER", "IMG2IMG_KEY"}
    variables = os.environ | {"IMG2IMG_SERVER": server, "IMG2IMG_KEY": KEY}
    command = [sys.executable, "-m", "img2img.cli", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lion.png").read_bytes().startswith(b"\x89PNG")


def test_pods_end_within_their_grace_period(releases: Releases, release: dict[str, Pod]) -> None:
    """SIGTERM, and nothing is left to do: exit code 0, long before anybody is killed."""
    for name in ("worker-fake", "gateway"):
        deployment = releases["helm4", "none-autoscaling"].named("Deployment", f"{PICTURES}-{name}")
        release[name].process.signal(signal.SIGTERM)
        assert release[name].process.wait(deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]) == 0

"""What the chart starts, started: processes with a pod's variables, files and commands, and its probes."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helm.rendering import Object, Rendered, environment
from tests.stack import Process, eventually

Releases = dict[tuple[str, str], Rendered]
KEY: Final = "i2i_a-key-of-the-test"
TENANTS: Final = f'[[tenants]]\naccount = "acme"\nkey_sha256 = ["{hashlib.sha256(KEY.encode()).hexdigest()}"]\n'
PICTURES: Final = "pictures-img2img"
MOVED: Final = {
    "IMG2IMG_HOST": "127.0.0.1",
    "IMG2IMG_METRICS_HOST": "127.0.0.1",
    "IMG2IMG_HTTP_PORT": "0",
    "IMG2IMG_GRPC_PORT": "0",
    "IMG2IMG_METRICS_PORT": "0",
}
"""What cannot be here as it is in a pod: ports are free ones of this machine."""


class Pod:
    """A process of a container: its variables, with files and the queue server where they are on this machine."""

    def __init__(self, container: Object, files: Path, redis_url: str) -> None:
        self.container = container
        given = environment(container) | {"IMG2IMG_REDIS_URL": redis_url}
        here = {name: value.replace("/etc/img2img", str(files)) for name, value in given.items()}
        [program] = container["args"]
        moved = {name: value for name, value in MOVED.items() if name in here}
        self.process = Process(program, f"{program}_ready", here | moved, files / f"{program}.log")
        self.process.wait_ready()
        said = {entry["event"]: entry for entry in self.process.entries()}
        # A gateway names both of its ports when it is ready, a worker its only one.
        self.ports = {
            "http": said.get("gateway_ready", {}).get("http_port"),
            "grpc": said.get("gateway_ready", {}).get("grpc_port"),
            "metrics": said.get("metrics_ready", {}).get("port"),
        }

    def passes(self, probe: str) -> bool:
        """Whether the kubelet would be content."""
        action = self.container[probe]
        if "grpc" in action:
            with grpc.insecure_channel(f"127.0.0.1:{self.ports['grpc']}") as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        path, port = action["httpGet"]["path"], self.ports[action["httpGet"]["port"]]
        return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=10).is_success


@pytest.fixture(scope="module")
def release(releases: Releases, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[dict[str, Any]]:
    """Gateway and worker of the case that needs no GPU, and its folder of mounted files."""
    rendered, files = releases["helm4", "none-autoscaling"], tmp_path_factory.mktemp("etc")
    for name, text in {
        "pools/pools.toml": rendered.named("ConfigMap", f"{PICTURES}-pools")["data"]["pools.toml"],
        "tenants/tenants.toml": TENANTS,
    }.items():
        (files / name).parent.mkdir()
        (files / name).write_text(text)
    pods: dict[str, Pod] = {}
    try:
        for name in ("gateway", "worker-fake"):
            spec = rendered.named("Deployment", f"{PICTURES}-{name}")["spec"]["template"]["spec"]
            pods[name] = Pod(spec["containers"][0], files, valkey_url)
        yield pods | {"files": files}
    finally:
        for pod in reversed(pods.values()):
            pod.process.close()


@pytest.mark.parametrize("name", ["gateway", "worker-fake"])
def test_probes_pass(release: dict[str, Any], name: str) -> None:
    """Each of the three, at the ports and paths that the pod names."""
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        eventually(lambda probe=probe: release[name].passes(probe), f"{name} to pass its {probe}")


def test_the_tests_command_makes_a_picture(releases: Releases, release: dict[str, Any], tmp_path: Path) -> None:
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


def test_pods_end_within_their_grace_period(releases: Releases, release: dict[str, Any]) -> None:
    """SIGTERM, and nothing is left to do: exit code 0, long before anybody is killed."""
    for name in ("worker-fake", "gateway"):
        deployment = releases["helm4", "none-autoscaling"].named("Deployment", f"{PICTURES}-{name}")
        release[name].process.signal(signal.SIGTERM)
        assert release[name].process.wait(deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]) == 0

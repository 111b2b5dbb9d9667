"""A pod's process on this machine: its variables and arguments, with files, ports and the queue server moved here."""

import hashlib
from pathlib import Path
from typing import Final

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helm.rendering import Object, Rendered, environment
from tests.stack import Process

KEY: Final = "i2i_a-key-of-the-test"
OPERATORS_KEY: Final = "i2i_another-key-of-the-test"
TENANTS: Final = f"""
[[tenants]]
account = "acme"
key_sha256 = ["{hashlib.sha256(KEY.encode()).hexdigest()}"]

[[operators]]
name = "keda"
key_sha256 = ["{hashlib.sha256(OPERATORS_KEY.encode()).hexdigest()}"]
"""
MOVED: Final = {
    "IMG2IMG_HOST": "127.0.0.1",
    "IMG2IMG_METRICS_HOST": "127.0.0.1",
    "IMG2IMG_HTTP_PORT": "0",
    "IMG2IMG_GRPC_PORT": "0",
    "IMG2IMG_METRICS_PORT": "0",
    "IMG2IMG_SCALER_PORT": "0",
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
        # A gateway names its ports when it is ready, a worker its only one.
        self.ports = {
            "http": said.get("gateway_ready", {}).get("http_port"),
            "grpc": said.get("gateway_ready", {}).get("grpc_port"),
            "scaler": said.get("gateway_ready", {}).get("scaler_port"),
            "metrics": said.get("metrics_ready", {}).get("port"),
        }

    def passes(self, probe: str) -> bool:
        """Whether the kubelet would be content."""
        action = self.container[probe]
        if "grpc" in action:
            with grpc.insecure_channel(f"127.0.0.1:{self.ports['grpc']}") as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        path, port = action["httpGet"]["path"], self.ports[action["httpGet"]["port"]]
        return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=60).is_success


def mount(rendered: Rendered, files: Path) -> None:
    """Write into ``files`` what is at /etc/img2img: the pools file of the release, a tenants file of the tests."""
    [pools] = [item["data"]["pools.toml"] for item in rendered.of("ConfigMap") if "pools.toml" in item.get("data", {})]
    for name, text in {"pools/pools.toml": pools, "tenants/tenants.toml": TENANTS}.items():
        (files / name).parent.mkdir()
        (files / name).write_text(text)

"""The init container's script: weights are there whole and right, or the worker does not start."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helm.rendering import CHART

WEIGHTS = bytes(range(256)) * 12_000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class Store(BaseHTTPRequestHandler):
    """Serves the weights to who has the key; some of them at /short."""

    def do_GET(self) -> None:
        if self.headers.get("authorization") != "Bearer key":
            self.send_error(401)
            return
        self.send_response(200)
        self.send_header("content-length", str(len(WEIGHTS)))
        self.end_headers()
        self.wfile.write(WEIGHTS[:1000] if self.path == "/short" else WEIGHTS)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def fetch(url: str, file: Path, sha256: str = SHA256, key: str = "Bearer key") -> subprocess.CompletedProcess[str]:
    environment = {"AUTHORIZATION": key, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-I", CHART / "files" / "fetch.py", url, sha256, file]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_weights_are_fetched_once(store: str, tmp_path: Path) -> None:
    """What is there and right is not fetched again: the second URL leads nowhere."""
    file = tmp_path / "models" / "some.safetensors"
    assert fetch(f"{store}/weights", file).returncode == 0
    assert file.read_bytes() == WEIGHTS
    again = fetch("http://127.0.0.1:9/", file)
    assert (again.returncode, again.stderr) == (0, f"{file} is there already\n")


def test_a_wrong_file_is_replaced(store: str, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"old")
    assert fetch(f"{store}/weights", file).returncode == 0
    assert file.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("path", "sha256", "key", "reason"),
    [
        ("/weights", "0" * 64, "Bearer key", f"its SHA-256 is {SHA256}"),
        ("/short", SHA256, "Bearer key", "its SHA-256 is"),
        ("/weights", SHA256, "", "401"),
    ],
)
def test_what_is_wrong_leaves_nothing(
    store: str, tmp_path: Path, path: str, sha256: str, key: str, reason: str
) -> None:
    """Another hash, a connection that breaks off, a missing key: exit code 1, a reason, and no file."""
    done = fetch(f"{store}{path}", tmp_path / "some.safetensors", sha256, key)
    assert done.returncode == 1
    assert reason in done.stderr
    assert list(tmp_path.iterdir()) == []
